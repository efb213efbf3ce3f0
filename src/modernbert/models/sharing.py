"""One encoder for several models: those that were trained on top of the same frozen encoder, or loaded twice.

Memory then holds the encoder once, and what one pass computes serves the heads of all.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from modernbert.engines.freeze import freeze
from modernbert.engines.guard import is_frozen
from modernbert.errors import InputError, listed, shown
from modernbert.models.base import PreTrainedModel
from modernbert.models.encoder import ModernBertModel
from modernbert.models.sentence_encoder import Encoder

# What an encoder computes by, beside its weights.
_COMPUTES_BY = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "pruned_heads"),
    *("hidden_activation", "norm_eps", "norm_bias", "attention_bias", "mlp_bias", "max_position_embeddings"),
    *("layer_types", "local_attention", "rope_parameters", "deterministic_flash_attn", "reference_compile"),
)


def headed(model: Any) -> PreTrainedModel:
    """The model with its head, without what comes after that in a sentence encoder or a sparse one."""
    inner: PreTrainedModel = model.model if isinstance(model, Encoder) else model
    return inner


def encoder_of(model: Any) -> ModernBertModel | None:
    """The encoder inside a model, or the model itself if it has no head; None if it has none, as decoders."""
    body = getattr(headed(model), "base_model", None)
    return body if isinstance(body, ModernBertModel) else None


def difference(one: ModernBertModel, other: ModernBertModel) -> str | None:
    """How two encoders differ, in words, the first one's value first; None if they compute the same bits.

    Frozen encoders stay frozen: their weights are read out of the kernels' layout, a layer at a time. Of the weights
    those that training changes most are compared first, so that two fine-tuned encoders are told apart at once.
    """
    if one is other:
        return None
    for name in _COMPUTES_BY:
        ours, theirs = (getattr(model.config, name) for model in (one, other))
        if ours != theirs:
            return f"{name} is {shown(ours)} and {shown(theirs)}"
    for name, ours, theirs in (
        ("weights", one.quantization or _plainly(one.dtype), other.quantization or _plainly(other.dtype)),
        ("the device", str(one.device), str(other.device)),
        ("attn_implementation", one.attn_implementation, other.attn_implementation),
    ):
        ours, theirs = (getattr(value, "scheme", value) for value in (ours, theirs))
        if ours != theirs:
            return f"{name}: {ours} and {theirs}"
    for place in ("final_norm", *(f"layers.{i}" for i in reversed(range(len(one.layers)))), "embeddings"):
        ours, theirs = (_weights(model.get_submodule(place)) for model in (one, other))
        if ours.keys() != theirs.keys():
            return f"{place} has {listed(ours)} and {listed(theirs)}"
        for name, weight in ours.items():
            if not _same_bits(weight, theirs[name]):
                return f"{place}.{name} holds other numbers"
    return None


def _plainly(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _weights(part: nn.Module) -> dict[str, Tensor]:
    """The weights of a part, in their plain layout; quantized ones by their codes."""
    plain = copy.deepcopy(part) if is_frozen(part) else part
    return nn.Module.state_dict(plain)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


class SharedEncoder:
    """The encoder of the first model, which those that follow use instead of their own.

    Models that are frozen are thawed when they join, and `finish` freezes all of them together. What is done to the
    encoder of one is then done to that of all: moving, thawing, training.

    Attributes:
        encoder: of all models; None as long as there is none.
        names: of the models.
    """

    def __init__(self) -> None:
        self.encoder: ModernBertModel | None = None
        self.names: list[str] = []
        self._models: list[PreTrainedModel] = []
        self._was_frozen = self._has_changed = False

    def add(self, name: str, model: Any) -> Any:
        """Have a model join; gives the model, which is the shared encoder itself if it has no head.

        Args:
            name: for messages.
            model: an encoder, with a head or without, or a `SentenceEncoder`, `MultiVectorEncoder` or `SparseEncoder`.

        Raises:
            InputError: its encoder is another one; it says how.
        """
        body = encoder_of(model)
        if body is None:
            raise InputError(f"{name} is a {type(headed(model)).__name__}; only encoders share a pass")
        if adapters := _adapters(model):
            raise InputError(
                f"{name} has adapters ({listed(adapters)}), which change its encoder; merge them, and it has one of "
                "its own"
            )
        if self.encoder is None:
            self.encoder = body
        elif how := difference(self.encoder, body):
            raise InputError(f"{self.names[0]} and {name} have different encoders: {how}")
        self.names.append(name)
        inner = headed(model)
        self._was_frozen |= is_frozen(inner)
        if body is not self.encoder:
            if not self._has_changed:
                self._each("thaw")
                self._has_changed = True
            inner.thaw()
            model = _with(model, self.encoder)
        if (inner := headed(model)) is not self.encoder and all(inner is not other for other in self._models):
            self._models.append(inner)
        return model

    def finish(self, frozen: bool = False) -> None:
        """Freeze all models together if `frozen` asks for it, or one of them was frozen and encoders were replaced."""
        if self.encoder is not None and (frozen or (self._has_changed and self._was_frozen)):
            self._each("eval")
            freeze(nn.ModuleList([self.encoder, *self._models]), self.encoder, self._models)
        self._has_changed = False

    def _each(self, method: str) -> None:
        for model in [*self._models, self.encoder]:
            getattr(model, method)()


def _adapters(model: Any) -> list[str]:
    inner = headed(model)
    return list(dict.fromkeys([*inner.adapter_names, *inner.base_model.adapter_names]))


def _with(model: Any, encoder: ModernBertModel) -> Any:
    """The model with another encoder inside, equal to its own."""
    inner = headed(model)
    if isinstance(inner, ModernBertModel):
        if isinstance(model, Encoder):
            model.model = encoder
            return model
        return encoder
    setattr(inner, inner.base_model_prefix, encoder)
    inner.tie_weights()
    return model
