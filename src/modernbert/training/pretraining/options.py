"""Options of pretraining; see `modernbert.training.options`. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from modernbert.checks import option
from modernbert.errors import InputError
from modernbert.training.options import TrainingOptions, changed

KINDS = ("mlm", "clm")
DTYPES = ("float32", "bfloat16", "float16")
SCALINGS = ("linear", "yarn")
_OF_NEW_MODELS = ("config", "hidden_size", "intermediate_size", "layers", "heads", "initializer_range")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainOptions(TrainingOptions):
    """Train a language model on prepared text: an encoder by masked tokens, or a decoder by next tokens.

    Defaults of the optimizer and of the schedule follow the recipe of ModernBERT (arXiv:2412.13663).
    """

    data: list[str] = option([], "Folder that `modernbert prepare-data` made.", required=True)
    objective: str = option(
        "mlm", "mlm trains an encoder by masked tokens, clm a decoder by next tokens.", choices=KINDS
    )
    weight: list[str] = option(
        [], "SOURCE=WEIGHT: tokens to take, relative to the other sources.", otherwise="by their sizes"
    )
    model: str | None = option(
        None, "Start from this encoder or decoder, a folder or Hub repository.", otherwise="a new model"
    )
    config: str | None = option(
        None, "JSON file or folder with the configuration of a new model.", otherwise="that of ModernBERT-base"
    )
    hidden_size: int | None = option(None, "Width of a new model.", least=1, otherwise="the configuration's")
    intermediate_size: int | None = option(None, "Width of its MLPs.", least=1, otherwise="the configuration's")
    layers: int | None = option(None, "Number of its layers.", least=1, otherwise="the configuration's")
    heads: int | None = option(None, "Attention heads of each of its layers.", least=1, otherwise="the configuration's")
    initializer_range: float | None = option(
        None, "Standard deviation of a new model's weights.", above=0, otherwise="the configuration's"
    )
    context: int | None = option(
        None, "Longest text of the model, in tokens.", least=1, otherwise="that of model, or the data's longest text"
    )
    global_rope_theta: float | None = option(
        None, "Base period of the rotary embedding in global layers.", otherwise="the configuration's"
    )
    local_rope_theta: float | None = option(
        None, "Base period of the rotary embedding in local layers.", otherwise="the configuration's"
    )
    rope_scaling: str | None = option(
        None, "TYPE:FACTOR stretches positions for a longer context, as linear:4 or yarn:4.", otherwise="none"
    )
    mask_rate: str = option("0.3", "mlm: share of the tokens to mask; 0.3,0.15@0.8 takes 0.15 after 0.8 of the steps.")
    epochs: float = changed(TrainingOptions, "epochs", 1.0, help="Number of passes over the data.")
    batch_tokens: int = option(65536, "Tokens per step.", least=1)
    batch_start: int | None = option(
        None, "Tokens of the first step, if the batch grows to batch_tokens.", least=1, otherwise="batch_tokens"
    )
    batch_warmup: int = option(0, "Tokens over which the batch grows; 0 means none.", least=0)
    lr: float | None = changed(TrainingOptions, "lr", 8e-4, otherwise="")
    weight_decay: float = changed(TrainingOptions, "weight_decay", 1e-5)
    schedule: str = changed(TrainingOptions, "schedule", "wsd")
    warmup: float = changed(TrainingOptions, "warmup", 0.02)
    decay: float = changed(TrainingOptions, "decay", 0.1)
    eval_every: int | None = changed(TrainingOptions, "eval_every", 500, otherwise="")
    eval_tokens: int = option(
        200_000, "Held-out tokens of each source for an evaluation; the last evaluation reads all.", least=1
    )
    save_every: int | None = changed(TrainingOptions, "save_every", 500, otherwise="")
    keep_best: bool = changed(TrainingOptions, "keep_best", False)
    save_dtype: str = option("float32", "Type of the finished model's weights on disk.", choices=DTYPES)
    shard: bool = option(False, "Divide weights, gradients and optimizer among the processes (FSDP2).")
    verify: bool = option(True, "Check the checksums of all shards before the run.")

    def __post_init__(self) -> None:
        super().__post_init__()
        start = self.batch_tokens if self.batch_start is None else self.batch_start
        if self.batch_tokens % self.micro_tokens or start % self.micro_tokens:
            raise InputError(
                f"batch_tokens {self.batch_tokens} and batch_start {start} must be multiples of micro_tokens, "
                f"{self.micro_tokens}"
            )
        if start > self.batch_tokens:
            raise InputError(f"batch_start is {start}; it must be at most batch_tokens, {self.batch_tokens}")
        if (self.batch_start is None) != (not self.batch_warmup):
            raise InputError("a growing batch needs both batch_start and batch_warmup; give the other one too")
        fresh = [name for name in _OF_NEW_MODELS if getattr(self, name) is not None]
        if self.model is not None and fresh:
            raise InputError(f"{fresh[0]} is for a new model, and model is {self.model}, which has its own; give one")
        if self.rope_scaling is not None and (self.model is None or self.context is None):
            raise InputError(f"rope_scaling is {self.rope_scaling}; it extends a model to a context: give both")
        _ = self.mask_rates, self.weights, self.scaling

    @property
    def mask_rates(self) -> list[tuple[float, float]]:
        """(share of the run from which it holds, rate) pairs, in order."""
        parts = [part.partition("@") for part in self.mask_rate.split(",")]
        rates = [(_number(share or "0"), _number(rate)) for rate, _, share in parts]
        if any(math.isnan(number) for pair in rates for number in pair):
            raise InputError(f"mask_rate is {self.mask_rate!r}; write 0.3, or 0.3,0.15@0.8")
        if rates[0][0] or rates != sorted(rates) or any(not (0 <= s < 1 and 0 < r < 1) for s, r in rates):
            raise InputError(f"mask_rate is {self.mask_rate!r}; rates lie between 0 and 1, shares rise from 0")
        return rates

    @property
    def weights(self) -> dict[str, float]:
        """Weights of sources by name; empty if every source counts by its size."""
        weights = {}
        for given in self.weight:
            name, _, value = given.rpartition("=")
            weights[name] = _number(value)
            if not name or not 0 <= weights[name] < math.inf:
                raise InputError(f"weight is {given!r}; write SOURCE=WEIGHT, such as wikipedia=2.5")
        return weights

    @property
    def scaling(self) -> Mapping[str, Any]:
        """Fields of a scaled rotary embedding; none without one."""
        if self.rope_scaling is None:
            return {}
        kind, _, factor = self.rope_scaling.partition(":")
        if kind not in SCALINGS or not _number(factor) >= 1:
            raise InputError(f"rope_scaling is {self.rope_scaling!r}; write {' or '.join(f'{s}:4' for s in SCALINGS)}")
        return {"rope_type": kind, "factor": float(factor)}


def _number(text: str) -> float:
    """A number of a text; NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
