"""What every model can do beside loading and saving: resize, prune, checkpoint activations, freeze for inference."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from modernbert.config import Config
from modernbert.engines.freeze import freeze
from modernbert.engines.guard import Frozen, is_frozen, thaw
from modernbert.errors import ConfigError, InputError, shown
from modernbert.models.formats import Quantization, weight_format
from modernbert.models.initialization import around_mean, initial_std, initialize
from modernbert.models.loading import Checkpointed
from modernbert.models.placement import warn_once
from modernbert.nn.backbone import Backbone
from modernbert.nn.layers import MLP, Attention
from modernbert.nn.recompute import Recompute


class PreTrainedModel(Checkpointed):
    """Base of all models.

    A model with a head keeps its encoder in `model`; the encoder is its own `base_model`. Subclasses name the
    tied weights that a checkpoint leaves out.

    Args:
        config: the architecture.
        attn_implementation: "auto", "eager", "sdpa", "native", "flash_attention_2" or "flex_attention"; one that
            cannot run here raises `BackendError` with the reason, and "auto" takes what suits the device and dtype.
    """

    _frozen: Frozen | None = None  # once optimized for inference

    def __init__(self, config: Config, attn_implementation: str | None = "auto") -> None:
        super().__init__(config, attn_implementation)
        self.is_gradient_checkpointing = False

    def _finish(self) -> None:
        """Initialise and tie; the last line of every constructor. The encoder inside a model has done its part."""
        prefix = f"{self.base_model_prefix}."
        own = {name for name, p in self.named_parameters() if not name.startswith(prefix) and not p.is_meta}
        initialize(self, self.config, only=own)
        self.tie_weights()
        if self.config.reference_compile and self.base_model is self:
            for module in self.modules():
                if isinstance(module, MLP):
                    module.compile(dynamic=True)

    @property
    def quantization(self) -> Quantization | None:
        """How the model is quantized, and what was measured then; None where its weights are floats."""
        return weight_format().of_model(self, self.config)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; training mode ends `optimize_for_inference`.

        Raises:
            ValueError: training is asked for, and the model is quantized.
        """
        if mode and self.quantization is not None:
            raise ValueError(
                f"{type(self).__name__} is quantized ({self.quantization.scheme}): whole numbers have no gradient. "
                "Train the float checkpoint, and quantize what comes out"
            )
        if mode and self.dtype in (torch.bfloat16, torch.float16):
            warn_once(
                f"training with weights in {str(self.dtype).removeprefix('torch.')}, which lose most small steps; load "
                "them with dtype='float32'"
            )
        if mode:
            self.unpack()
        return super().train(mode)

    # Embeddings

    @property
    def base_model(self) -> Any:
        """The encoder without its head."""
        return getattr(self, self.base_model_prefix, self)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding, of weight (vocabulary, hidden)."""
        return self.base_model.embeddings.tok_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another token embedding in place; a tied output follows. Ends `optimize_for_inference`."""
        self._refuse_quantized("set_input_embeddings")
        self.unpack()
        self.base_model.embeddings.tok_embeddings = value
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear | None:
        """The layer that gives logits over the vocabulary, or None where the model has none."""
        return getattr(self, "decoder", None)

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Put another output layer in place; one with a weight of its own is no longer tied to the embedding."""
        if self.get_output_embeddings() is None:
            raise TypeError(f"{type(self).__name__} has no output embeddings")
        self._refuse_quantized("set_output_embeddings")
        self.unpack()
        self.decoder = value
        embedding = self.get_input_embeddings()
        if self.config.tie_word_embeddings and value.weight is not embedding.weight:
            self.config = self.base_model.config = self.config.replace(tie_word_embeddings=False)
            self.base_model.embeddings.is_tied = False

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(value, "base_layer") and f"{name}.weight" in self.tied_weights and self.config.tie_word_embeddings:
            raise InputError(
                f"an adapter was put on {name!r}, whose weight is the token embedding's (tie_word_embeddings), which "
                f"merging it would change too; leave it out, with PEFT by exclude_modules=[{name!r}]"
            )
        if self._frozen is not None and name not in ("_frozen", "runner") and (name != "training" or value):
            self._frozen.thaw(f"{name!r} of a {type(self).__name__} was set")
        super().__setattr__(name, value)

    def tie_weights(self) -> None:
        """Let tied parameters share one tensor, where the configuration ties them."""
        if not self.config.tie_word_embeddings or "weight" not in self.get_input_embeddings()._parameters:
            return  # what has no parameter shares what it was made of
        for name, source in self.tied_weights.items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, self.get_parameter(source))
            self.base_model.embeddings.is_tied = True

    @torch.no_grad()
    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Give the vocabulary more or fewer ids, in the embedding and in the output.

        Rows past the new end are dropped.

        Args:
            new_num_tokens: the new size; None keeps the present one.
            pad_to_multiple_of: round the size up to a multiple of this.
            mean_resizing: draw new rows closely around the mean of the old ones, so that at first a new token is as
                likely as a usual one; False initializes them as a fresh model's.

        Returns:
            The token embedding.

        Raises:
            ValueError: the size is below 1, or leaves the padding id outside, or the model is quantized.
        """
        self._refuse_quantized("resize_token_embeddings")
        self.unpack()
        old = self.get_input_embeddings()
        if new_num_tokens is not None and (not isinstance(new_num_tokens, int) or isinstance(new_num_tokens, bool)):
            raise ValueError(f"new_num_tokens is {shown(new_num_tokens)}; it must be a whole number, or None")
        size = old.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size = math.ceil(size / pad_to_multiple_of) * pad_to_multiple_of
        if size < 1:
            raise ValueError(f"new_num_tokens is {new_num_tokens}; a vocabulary has at least 1 id")
        if size == old.num_embeddings:
            return old
        if self.config.pad_token_id is not None and self.config.pad_token_id >= size:
            raise ConfigError(
                f"new_num_tokens is {size}, which leaves pad_token_id {self.config.pad_token_id} outside; choose a "
                "larger number, or another padding id first"
            )
        config = self.config.replace(vocab_size=size)

        def resized(weight: Tensor, name: str) -> nn.Parameter:
            new = weight.new_zeros((size, *weight.shape[1:]))
            rows = min(size, weight.shape[0])
            if mean_resizing:
                around_mean(new, weight)
            elif weight.dim() == 2:
                std = initial_std(name, config)
                cutoff = config.initializer_cutoff_factor * std
                nn.init.trunc_normal_(new, std=std, a=-cutoff, b=cutoff)
            new[:rows] = weight[:rows]
            return nn.Parameter(new, requires_grad=weight.requires_grad)

        old.weight = resized(old.weight, "tok_embeddings")
        old.num_embeddings = size
        output = self.get_output_embeddings()
        if output is not None:
            output.weight = resized(output.weight, "decoder")
            output.out_features = size
            if output.bias is not None:
                output.bias = resized(output.bias, "decoder")
        self.config = config
        self.base_model.config = config
        self.tie_weights()
        return old

    # Surgery, training, inference

    def prune_heads(self, heads_to_prune: Mapping[int, Iterable[int]]) -> None:
        """Remove attention heads for good.

        Args:
            heads_to_prune: for each layer's number the heads to remove, numbered as in the unpruned model;
                heads that are gone already are passed over.

        Raises:
            ConfigError: a layer or head does not exist.
            ValueError: no head would be left in a layer, or the model is quantized.
        """
        self._refuse_quantized("prune_heads")
        pruned = {**self.config.pruned_heads}
        for layer, heads in heads_to_prune.items():
            pruned[layer] = sorted({*pruned.get(layer, []), *heads})
            if len(pruned[layer]) >= self.config.num_attention_heads:
                raise ValueError(f"prune_heads would remove all {len(pruned[layer])} heads of layer {layer}")
        config = self.config.replace(pruned_heads=pruned)  # refuses layers and heads that do not exist
        self.unpack()
        layers: Any = self.base_model.layers
        for layer in heads_to_prune:
            attention: Attention = layers[layer].attn
            before = self.config.pruned_heads.get(layer, [])
            present = [h for h in range(config.num_attention_heads) if h not in before]
            attention.prune([i for i, head in enumerate(present) if head in pruned[layer]])
        self.config = config
        self.base_model.config = config

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, keep_bytes: int | None = None
    ) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations.

        Args:
            gradient_checkpointing_kwargs: accepted for compatibility; only `use_reentrant=False` is served.
            keep_bytes: recompute no more layers than it takes for the others' activations to fit into so many bytes.

        Raises:
            ValueError: an argument cannot be served.
        """
        if keep_bytes is not None and keep_bytes < 0:
            raise ValueError(f"keep_bytes is {keep_bytes}; it must be a number of bytes, at least 0")
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("gradient_checkpointing_kwargs has use_reentrant=True; only False is served")
        for model in (self, self.base_model):
            model.is_gradient_checkpointing = True
        self.base_model.recompute = Recompute(keep_bytes)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass again."""
        self.is_gradient_checkpointing = self.base_model.is_gradient_checkpointing = False

    def optimize_for_inference(self) -> Self:
        """Freeze the model to serve: evaluation mode, no gradients, weights laid out once for kernels of our own.

        Changes the model in place and returns it. Results stay the same but for rounding, and a text's do not depend
        on its batch. Saving and copying give plain weights. Whatever would change the weights, or needs the modules
        themselves, thaws the model first, which is then what it was before: training mode, `requires_grad_`, moving,
        loading, resizing, pruning, hooks, gradients by the inputs, autocast, and reading or assigning a layer's weights
        or attributes; `unpack()` thaws it by hand. A parameter that was taken from `parameters()` has no numbers
        meanwhile, and raises `FrozenError` where it is used. What shares memory with a weight from before, such as a
        state dict, is no longer followed. `torch.compile` wants a plain model.
        """
        self.eval()
        if self._frozen is None:
            freeze(self, self.base_model)
        return self

    def unpack(self) -> None:
        """Undo `optimize_for_inference`, but for the mode: which parameters have gradients is as it was before.

        A parameter whose gradient somebody switched off meanwhile stays without.
        """
        thaw(self)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Let all parameters have gradients, or none; ends `optimize_for_inference` where they shall have some."""
        if requires_grad:
            self.unpack()
        elif self._frozen is not None:
            self._frozen.leave_off(self.parameters())
        return super().requires_grad_(requires_grad)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:  # what moves and casts a model
        self.unpack()
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights by their names; see `torch.nn.Module.load_state_dict`. Ends `optimize_for_inference`."""
        self.unpack()
        return super().load_state_dict(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Weights by their names; see `torch.nn.Module.state_dict`.

        Whoever holds them may write to them, so this ends `optimize_for_inference`; `save_pretrained` does not.
        """
        self.unpack()
        return super().state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = new = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        whole = copy.deepcopy(self) if is_frozen(self) else self  # a copy is not frozen
        return super(PreTrainedModel, whole).__reduce_ex__(protocol)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count parameters, tied ones once; quantized ones too."""
        embedding = self.get_input_embeddings()._parameters.get("weight") if exclude_embeddings else None
        counted = [p for p in self.parameters() if p is not embedding and (p.requires_grad or not only_trainable)]
        quantized = 0 if only_trainable else weight_format().count(self, exclude_embeddings)
        return sum(p.numel() for p in counted) + quantized

    def _refuse_quantized(self, what: str) -> None:
        if self.quantization is not None:
            raise ValueError(f"{what} needs float weights; the model is quantized ({self.quantization.scheme})")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


class BareModel(PreTrainedModel, Backbone):
    """A backbone that loads and saves itself.

    Args:
        config: the architecture.
        attn_implementation: see `PreTrainedModel`.
    """

    def __init__(self, config: Config, attn_implementation: str | None = "auto") -> None:
        self._check_config(config)
        config.shapes_a_model()
        Backbone.__init__(self, config, attn_implementation)
        self._finish()
