"""Options of pretraining; see `modernbert.training.options`. Nothing here imports torch."""

from __future__ import annotations

import dataclasses

from modernbert.errors import InputError
from modernbert.training.options import TrainingOptions, option

KINDS = ("mlm", "clm")
DTYPES = ("float32", "bfloat16", "float16")
SCALINGS = ("linear", "yarn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainOptions(TrainingOptions):
    """A language model from raw text: an encoder by masked tokens, or a decoder by the next ones.

    Defaults of the optimizer and of the schedule follow the recipe of ModernBERT (arXiv:2412.13663).
    """

    data: list[str] = option([], "Folder that `modernbert prepare-data` made; repeat for several.", required=True)
    output: str = option(
        "", "Folder of the run: metrics, checkpoints, the finished model and its report.", required=True
    )
    objective: str = option("mlm", "mlm: an encoder, by masked tokens; clm: a decoder, by the next ones.", KINDS)
    weight: list[str] = option(
        [], "SOURCE=WEIGHT: share of the tokens, in any unit, one for every source; repeat.", otherwise="by their sizes"
    )
    model: str | None = option(
        None, "Start from the weights of this folder or Hub repository, of either kind.", otherwise="a new model"
    )
    config: str | None = option(
        None, "JSON file or folder with the configuration of a new model.", otherwise="that of ModernBERT-base"
    )
    hidden_size: int | None = option(None, "Width of a new model.", otherwise="the configuration's")
    intermediate_size: int | None = option(None, "Width of its MLPs.", otherwise="the configuration's")
    layers: int | None = option(None, "Number of its layers.", otherwise="the configuration's")
    heads: int | None = option(None, "Its attention heads a layer.", otherwise="the configuration's")
    initializer_range: float | None = option(
        None, "Standard deviation of its initial weights.", otherwise="the configuration's"
    )
    context: int | None = option(
        None,
        "Longest text of the model, in tokens.",
        otherwise="the data's longest, or that of the model to start from",
    )
    global_rope_theta: float | None = option(
        None, "Base period of the rotary embedding in global layers.", otherwise="the configuration's"
    )
    local_rope_theta: float | None = option(
        None, "Base period of the rotary embedding in local layers.", otherwise="the configuration's"
    )
    rope_scaling: str | None = option(
        None, "TYPE:FACTOR, for a context beyond the model's: linear:4 or yarn:4.", otherwise="none"
    )
    mask_rate: str = option("0.3", "mlm: share of the tokens to predict; 0.3,0.15@0.8,0.05@0.95 changes it on the way.")
    epochs: float = option(1.0, "Passes over the data.")
    batch_tokens: int = option(65536, "Tokens a step.")
    batch_start: int | None = option(
        None, "Tokens of the first step, where the batch grows to batch_tokens.", otherwise="batch_tokens"
    )
    batch_warmup: int = option(0, "Tokens over which the batch grows.")
    lr: float | None = option(8e-4, "Peak learning rate.")
    weight_decay: float = option(1e-5, "Decoupled weight decay of matrices.")
    schedule: str = option("wsd", TrainingOptions.__dataclass_fields__["schedule"].metadata["help"],
                           TrainingOptions.__dataclass_fields__["schedule"].metadata["choices"])  # fmt: skip
    warmup: float = option(0.02, "Share of the steps in which the rate rises.")
    decay: float = option(0.1, "wsd: share of the steps, the last ones, in which the rate falls.")
    eval_every: int | None = option(500, "Steps between evaluations.")
    eval_tokens: int = option(200_000, "Held-out tokens of each source that evaluations read; the last reads all.")
    save_every: int | None = option(500, "Steps between checkpoints.")
    keep_best: bool = option(False, "Finish with the weights of the best evaluation, not the last.")
    save_dtype: str = option("float32", "Of the finished model's weights on disk.", DTYPES)
    shard: bool = option(False, "Share weights, gradients and optimizer over the processes (FSDP2).")
    verify: bool = option(True, "Check the checksums of all shards before the run.")

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = ("hidden_size", "intermediate_size", "layers", "heads", "initializer_range", "context")
        self.check(lambda x: x > 0, "must be above 0", *sizes, "batch_tokens", "batch_start", "eval_tokens")
        self.check(lambda x: x >= 0, "must not be negative", "batch_warmup")
        if self.batch_tokens % self.micro_tokens or (self.batch_start or 0) % self.micro_tokens:
            raise InputError(
                f"batch_tokens {self.batch_tokens} and batch_start {self.batch_start or self.batch_tokens} must be "
                f"multiples of micro_tokens, {self.micro_tokens}"
            )
        if (self.batch_start or 0) > self.batch_tokens:
            raise InputError(f"batch_start is {self.batch_start}; it must be at most batch_tokens, {self.batch_tokens}")
        if (self.batch_start is None) != (not self.batch_warmup):
            raise InputError("a growing batch needs both batch_start and batch_warmup; give the other one too")
        fresh = [name for name in ("config", *sizes[:-1]) if getattr(self, name) is not None]
        if self.model is not None and fresh:
            raise InputError(f"{fresh[0]} is of a new model, and model is {self.model}, which has its own; give one")
        if self.rope_scaling is not None and (self.model is None or self.context is None):
            raise InputError(f"rope_scaling is {self.rope_scaling}; it extends a model to a context: give both")
        _ = self.mask_rates, self.weights, self.scaling

    @property
    def mask_rates(self) -> list[tuple[float, float]]:
        """(share of the run from which it holds, rate) pairs, in order."""
        rates = []
        for part in self.mask_rate.split(","):
            rate, _, share = part.partition("@")
            try:
                rates.append((float(share or 0), float(rate)))
            except ValueError:
                raise InputError(f"mask_rate is {self.mask_rate!r}; write 0.3, or 0.3,0.15@0.8") from None
        if rates[0][0] or rates != sorted(rates) or any(not (0 <= s < 1 and 0 < r < 1) for s, r in rates):
            raise InputError(f"mask_rate is {self.mask_rate!r}; rates lie between 0 and 1, shares rise from 0")
        return rates

    @property
    def weights(self) -> dict[str, float]:
        """Weights of sources by name; empty where every source counts by its size."""
        weights = {}
        for given in self.weight:
            name, _, value = given.rpartition("=")
            try:
                weights[name] = float(value)
            except ValueError:
                weights[name] = -1.0
            if not name or not 0 <= weights[name] < float("inf"):
                raise InputError(f"weight is {given!r}; write SOURCE=WEIGHT, such as wikipedia=2.5")
        return weights

    @property
    def scaling(self) -> dict[str, object] | None:
        """Fields of a scaled rotary embedding."""
        if self.rope_scaling is None:
            return None
        kind, _, factor = self.rope_scaling.partition(":")
        try:
            value = float(factor)
        except ValueError:
            value = 0.0
        if kind not in SCALINGS or value < 1:
            raise InputError(f"rope_scaling is {self.rope_scaling!r}; write {' or '.join(f'{s}:4' for s in SCALINGS)}")
        return {"rope_type": kind, "factor": value}
