"""How to quantize, as callers say it and as a checkpoint's `config.json` holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from modernbert.checks import Options, option
from modernbert.config import Config
from modernbert.errors import CheckpointError, shown
from modernbert.models.formats import KEY
from modernbert.quantization.rounding import Scheme
from modernbert.quantization.weight import GROUP

METHOD, FORMAT = "modernbert", 1
# What a weight is rounded to by each scheme; and to what next, where that costs too much. Bfloat16 is the last resort.
SCHEMES = {
    "int8": (Scheme(8, None), Scheme(8, GROUP, kept=256)),
    "int8-weight-only": (Scheme(8, None, float_rows=True), Scheme(8, GROUP, float_rows=True)),
    "int4": (Scheme(4, GROUP, kept=128), Scheme(8, GROUP, kept=256)),
    "int4-weight-only": (Scheme(4, GROUP, float_rows=True), Scheme(8, GROUP, float_rows=True)),
}
BFLOAT16 = "bfloat16"  # of a weight that keeps that much
_AMOUNTS = ("cosine_min", "cosine_mean", "tokens")
_COSINES = {8: 0.999, 4: 0.9}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationConfig(Options):
    """How to quantize a model, and how much it may cost.

    Args:
        scheme: "int8" and "int4" bring inputs to 8 bits as well, each token by itself; "int8-weight-only" and
            "int4-weight-only" leave them floats, which is slower on many tokens.
        min_cosine: between the last hidden states of the float model and the quantized one, at every token that is
            measured; None is 0.999 for 8 bits and 0.9 for 4. Other texts hold worse tokens, so more scales, which cost
            little, are spent until the model is twice as near.
        most_kept: share of the weights, 0 to 1, that may have more bits than the scheme's to reach it: bfloat16 in
            instead of 8, 8 instead of 4. If these do not suffice, quantizing is refused.
        tokens: how many tokens of the texts are read, half to choose by and half to measure on.

    Raises:
        ValueError: a value is impossible.
    """

    error: ClassVar[type[ValueError]] = ValueError

    scheme: str = option("int8", "Bits of weights, and whether inputs are rounded too.", choices=tuple(SCHEMES))
    min_cosine: float | None = option(None, "Least cosine of the worst token's last hidden state.", least=0, most=1)
    most_kept: float = option(0.25, "Share of the weights that may have more bits.", least=0, most=1)
    tokens: int = option(4096, "Tokens that are read, half to choose by and half to measure on.", least=64)

    @property
    def limit(self) -> float:
        """The cosine that must be reached."""
        return _COSINES[SCHEMES[self.scheme][0].bits] if self.min_cosine is None else self.min_cosine


class BitsAndBytesConfig:
    """Stands where code was written for the bitsandbytes library, and means the nearest that there is here.

    Args:
        load_in_8bit: "int8".
        load_in_4bit: "int4".
        kwargs: accepted, and without meaning here: bitsandbytes' own number formats and thresholds.

    Raises:
        ValueError: neither of the two is true, or both are.
    """

    def __init__(self, load_in_8bit: bool = False, load_in_4bit: bool = False, **kwargs: Any) -> None:
        unknown = [name for name in kwargs if not name.startswith(("bnb_4bit_", "llm_int8_"))]
        if unknown:
            raise TypeError(f"BitsAndBytesConfig got unknown arguments: {', '.join(unknown)}")
        if bool(load_in_8bit) == bool(load_in_4bit):
            raise ValueError("give either load_in_8bit=True or load_in_4bit=True")
        self.load_in_8bit, self.load_in_4bit = bool(load_in_8bit), bool(load_in_4bit)


def resolve(given: Any) -> QuantizationConfig:
    """What a caller names, made definite: a scheme's name, a mapping, a configuration, or one of bitsandbytes.

    Raises:
        ValueError: it means nothing here.
    """
    if isinstance(given, QuantizationConfig):
        return given
    if isinstance(given, str):
        return QuantizationConfig(scheme=given)
    if isinstance(given, Mapping) and "scheme" in given:
        return QuantizationConfig.of(given, "quantization_config")
    eight, four = (
        given.get(name) if isinstance(given, Mapping) else getattr(given, name, False)
        for name in ("load_in_8bit", "load_in_4bit")
    )
    if eight or four:  # also of transformers' own class
        return QuantizationConfig(scheme="int8" if eight else "int4")
    raise ValueError(
        f"quantization_config is {given!r}; give one of {', '.join(SCHEMES)}, a QuantizationConfig, or a "
        "BitsAndBytesConfig with load_in_8bit=True or load_in_4bit=True"
    )


@dataclasses.dataclass(frozen=True)
class Record:
    """What `config.json` says of a quantized checkpoint, under `quantization_config`."""

    scheme: str  # of `SCHEMES`
    finer: dict[str, str]  # weights that are rounded more finely than the scheme says, and how, by their modules' names
    measured: dict[str, Any]  # what quantizing cost; see `gate.Measured`

    @property
    def float_rows(self) -> bool:
        """Whether the inputs of products stay floats."""
        return SCHEMES[self.scheme][0].float_rows

    @classmethod
    def of(cls, config: Config) -> Record | None:
        """Of a model's configuration; None where the weights are floats."""
        values = config.extra.get(KEY)
        return None if values is None else cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """Read what `to_dict` wrote.

        Raises:
            CheckpointError: another library quantized it, or a later version of this one.
        """
        if not isinstance(values, Mapping):
            raise CheckpointError(f"config.json has {KEY} {shown(values)}; it must hold values by name")
        if values.get("quant_method") != METHOD:
            raise CheckpointError(
                f"the checkpoint was quantized by {shown(values.get('quant_method'))}, which this library does not "
                "read; take the float checkpoint and quantize it here"
            )
        version, scheme = values.get("format"), values.get("scheme")
        if version != FORMAT or scheme not in list(SCHEMES):
            raise CheckpointError(
                f"the checkpoint is quantized in format {shown(version)}, scheme {shown(scheme)}; this version reads "
                f"format {FORMAT} with {', '.join(SCHEMES)}; a newer modernbert may read it"
            )
        finer, measured = values.get("finer") or {}, values.get("measured") or {}
        if not isinstance(finer, Mapping) or not all(isinstance(how, str) for how in finer.values()):
            raise CheckpointError(f"{KEY} has finer {shown(finer)}; it must name schemes by module")
        number = int | float
        fits = isinstance(measured, Mapping) and isinstance(measured.get("agreement"), number | None)
        if not fits or not all(isinstance(measured.get(name, 0), number) for name in _AMOUNTS):
            raise CheckpointError(f"{KEY} has measured {shown(measured)}; it must hold numbers by name")
        return cls(str(scheme), dict(finer), dict(measured))
