"""Vectors of texts: the encoder, then pooling, dense layers and normalisation, as a checkpoint's folder says.

The folder's layout is that of the sentence-transformers library: `modules.json` names the parts, each in a folder of
its own. A folder without it is a bare encoder, pooled by the mean.

Shapes: B texts or spans, T real tokens of all texts together, M hidden size, D dimensions of a vector.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernbert.config import ModernBertDecoderConfig
from modernbert.errors import CheckpointError, InputError, listed, shown
from modernbert.io.checkpoint import read_weights, weight_files, weight_names, write_weights
from modernbert.io.files import write_text
from modernbert.io.hub import Source
from modernbert.models.adapters import with_base
from modernbert.models.encoder import ModernBertModel
from modernbert.models.formats import Quantization, weight_format
from modernbert.models.sentence_layout import (
    MODULES,
    SETTINGS,
    TRANSFORMER_SETTINGS,
    EmbeddingSettings,
    contents_of,
    kind_of_part,
    pooling_keys,
    pooling_of,
    settings_of,
)
from modernbert.nn.activations import activation
from modernbert.nn.inputs import Inputs
from modernbert.nn.layers import Linear
from modernbert.nn.packing import PackedInputs
from modernbert.nn.pooling import pool, unit

_TYPES = "sentence_transformers.models."
# Functions that a folder may name; only the name is read, nothing is imported.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.nn.modules.activation.Tanh": torch.tanh,
    "torch.nn.modules.activation.ReLU": F.relu,
    "torch.nn.modules.activation.GELU": activation("gelu"),
    "torch.nn.modules.activation.Sigmoid": activation("sigmoid"),
    "torch.nn.modules.activation.SiLU": activation("silu"),
    "torch.nn.modules.linear.Identity": lambda x: x,
}


class Dense(nn.Module):
    """A linear layer and an activation over vectors or over tokens.

    With `use_residual` its input is added to what comes out, by a matrix of its own if it has other dimensions.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str | None = None,
        use_residual: bool = False,
    ) -> None:
        super().__init__()
        self.linear = Linear(in_features, out_features, bias=bias)
        self.use_residual = use_residual
        if use_residual and in_features != out_features:
            self.residual = Linear(in_features, out_features, bias=False)
        self.activation = activation or "torch.nn.modules.activation.Tanh"
        if not isinstance(self.activation, str) or self.activation not in _ACTIVATIONS:
            raise CheckpointError(
                f"a dense layer names the activation {shown(self.activation)}; known are {', '.join(_ACTIVATIONS)}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        out = _ACTIVATIONS[self.activation](self.linear(x))
        if not self.use_residual:
            return out
        return out + (self.residual(x) if hasattr(self, "residual") else x)


class Normalize(nn.Module):
    """Length one for every vector."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return unit(x)


class Encoder(nn.Module):
    """A model of this package with parts after it: what it says of itself is what the model says."""

    model: Any
    settings: Any
    is_layout = False  # whether it came from a folder of its own kind, in sentence-transformers' layout

    @property
    def config(self) -> Any:
        """The encoder's configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.model.dtype

    @property
    def quantization(self) -> Quantization | None:
        """How the encoder is quantized; None if its weights are floats."""
        return self.model.quantization

    def optimize_for_inference(self) -> Self:
        """Make it ready to serve; see `PreTrainedModel.optimize_for_inference`."""
        self.eval()
        self.model.optimize_for_inference()
        return self

    def thaw(self) -> None:
        """Undo `optimize_for_inference`, except for the mode."""
        self.model.thaw()

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Let all parameters have gradients, or none; ends `optimize_for_inference` if they are to have some."""
        self.model.requires_grad_(requires_grad)
        return super().requires_grad_(requires_grad)


class SentenceEncoder(Encoder):
    """The encoder and what makes vectors of its states.

    Args:
        model: the encoder.
        settings: pooling, prompts and the like.
        after_tokens: parts that act on every token's state, in order.
        after_pooling: parts that act on pooled vectors, in order.

    Source: the folder layout of sentence-transformers; late chunking, arXiv:2409.04701; late interaction,
    arXiv:2004.12832.
    """

    def __init__(
        self,
        model: ModernBertModel,
        settings: EmbeddingSettings | None = None,
        after_tokens: Sequence[nn.Module] = (),
        after_pooling: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.settings = settings or EmbeddingSettings()
        self.after_tokens = nn.ModuleList(after_tokens)
        self.after_pooling = nn.ModuleList(after_pooling)

    @property
    def width(self) -> int:
        """Dimensions of what is pooled."""
        dense = [part.linear.out_features for part in self.after_tokens if isinstance(part, Dense)]
        return int(dense[-1] if dense else self.config.hidden_size)

    @property
    def dimensions(self) -> int:
        """Dimensions of a vector, D."""
        return min(self.full_dimensions, self.settings.truncate_dim or self.full_dimensions)

    @property
    def full_dimensions(self) -> int:
        """Dimensions that a vector has before `truncate_dim` of the settings takes its first ones."""
        dense = [part.linear.out_features for part in self.after_pooling if isinstance(part, Dense)]
        return int(dense[-1] if dense else self.width * max(len(self.settings.poolings), 1))

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: this model takes ids, and has no tokenizer for texts.

        Raises:
            InputError: always; it names what takes texts.
        """
        raise InputError(
            "a SentenceEncoder takes ids, not texts; vectors of texts: pipeline('sentence-embedding', folder)(texts)"
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        skip: int = 0,
    ) -> Tensor:
        """One vector a text.

        Args:
            input_ids: (B, S), or (T,) with `cu_seqlens`.
            attention_mask: (B, S), nonzero at real tokens.
            cu_seqlens: (B + 1,) cumulative lengths of packed texts.
            skip: tokens at the beginning of each text that are not pooled, such as a prompt's.

        Returns:
            (B, D).
        """
        inputs = self.model.pack_inputs(Inputs(input_ids, attention_mask, cu_seqlens=cu_seqlens))
        states_TM = self.token_vectors(inputs)
        spans = [(min(start + skip, end), end) for start, end in inputs.packing.spans]
        return self.pool(states_TM, spans, inputs.packing.positions_T)[:, : self.dimensions]

    def token_vectors(self, inputs: PackedInputs) -> Tensor:
        """A vector of every token, (T, M)."""
        states_TM = self.model.encode(inputs).last_TM
        for part in self.after_tokens:
            states_TM = part(states_TM)
        return states_TM

    def pool(
        self,
        states_TM: Tensor,
        spans: Sequence[tuple[int, int]],
        positions_T: Tensor,
        poolings: Sequence[str] | None = None,
    ) -> Tensor:
        """A vector of each span of token vectors, (B, full_dimensions).

        Args:
            states_TM: what `token_vectors` gave.
            spans: first token and the token after the last one of each.
            positions_T: positions of the tokens in their texts.
            poolings: modes instead of the checkpoint's.
        """
        modes = poolings or self.settings.poolings
        vectors = torch.cat([pool(states_TM, spans, mode, positions_T) for mode in modes], dim=-1)
        for part in self.after_pooling:
            vectors = part(vectors)
        return vectors

    # Folders

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a folder or a Hub repository, in evaluation mode.

        Args:
            pretrained_model_name_or_path: in sentence-transformers' layout, or a bare encoder's, which is pooled by the
                mean.
            kwargs: see `PreTrainedModel.from_pretrained`. An `adapter` is the encoder's, which switches:
                `encoder.model.set_adapter(name)`.

        Raises:
            NotFoundError: there is no such folder, repository or file.
            CheckpointError: the layout has parts that are not known here.
        """
        pretrained_model_name_or_path, kwargs = with_base(pretrained_model_name_or_path, kwargs)
        quantization = kwargs.pop("quantization_config", None)
        if quantization is not None:  # with the tokenizer of the whole folder
            encoder = cls.from_pretrained(pretrained_model_name_or_path, **kwargs)
            source = Source.pop_from(pretrained_model_name_or_path, dict(kwargs))
            encoder.model = weight_format().quantize(encoder.model, weight_format().resolve(quantization), source)
            return encoder
        origin = str(pretrained_model_name_or_path)
        source = Source.pop_from(origin, dict(kwargs))
        contents = contents_of(source)
        contents.refuse_cross_encoder()
        contents.refuse_unserved()
        parts, inner = contents.parts, contents.inner
        refuse_decoder(source.inside(inner))
        if not parts:
            model = ModernBertModel.from_pretrained(pretrained_model_name_or_path, **kwargs)
            return cls(model).eval()
        kinds = [kind_of_part(part) for part in parts]
        if kinds[0] != "Transformer":
            raise CheckpointError(
                f"{pretrained_model_name_or_path} has the parts {listed(kinds)}; the first must be a Transformer"
            )
        body = {**kwargs, "subfolder": source.inside(inner).subfolder}
        model = ModernBertModel.from_pretrained(pretrained_model_name_or_path, **body)
        values: dict[str, Any] = {"poolings": None}
        tokens: list[nn.Module] = []
        vectors: list[nn.Module] = []
        for part, kind in zip(parts[1:], kinds[1:], strict=True):
            there = source.inside(part["path"])
            of_part = there.read_json("config.json") if there.find("config.json") is not None else {}
            if kind == "Pooling":
                values |= pooling_of(of_part)
                continue
            on_tokens = of_part.get("module_input_name", "token_embeddings") == "token_embeddings"
            stage = tokens if values["poolings"] is None and on_tokens else vectors
            stage += layers_of(there, kind, of_part, model, "Transformer, Pooling")
        values["poolings"] = values["poolings"] or ()
        encoder = cls(model, EmbeddingSettings(**values, **settings_of(source, inner)), tokens, vectors)
        encoder._check_widths(origin)
        encoder.is_layout = True
        return encoder.eval()

    def _check_widths(self, origin: str) -> None:
        """Refuse dense parts that do not fit what comes before them."""
        width = self.config.hidden_size
        for stage, factor in ((self.after_tokens, len(self.settings.poolings) or 1), (self.after_pooling, 1)):
            for part in stage:
                if isinstance(part, Dense):
                    if part.linear.in_features != width:
                        raise CheckpointError(
                            f"{origin} has a dense part for {part.linear.in_features} dimensions after parts that give "
                            f"{width}"
                        )
                    width = part.linear.out_features
            width *= factor

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder in sentence-transformers' layout; the tokenizer is saved beside it by its own method."""
        self.model.save_pretrained(folder)
        self.save_layout(Path(folder))

    def save_layout(self, folder: Path) -> None:
        """Write all parts but the encoder, and what names them."""
        settings = self.settings
        parts = [dense_part(part, "token_embeddings") for part in self.after_tokens]
        if settings.poolings:
            pooling = {**pooling_keys(settings), "word_embedding_dimension": self.width}
            parts.append(Part(f"{_TYPES}Pooling", pooling))
        parts += [dense_part(part, "sentence_embedding") for part in self.after_pooling]
        about: dict[str, Any] = {
            "prompts": settings.prompts,
            "default_prompt_name": settings.default_prompt_name,
            "similarity_fn_name": settings.similarity,
        }
        if settings.truncate_dim is not None:
            about["truncate_dim"] = settings.truncate_dim
        limits: dict[str, Any] = {"do_lower_case": False}
        if settings.max_length is not None:  # the tokenizer's own limit counts otherwise
            limits["max_seq_length"] = settings.max_length
        write_layout(folder, parts, about, limits)


class Part(NamedTuple):
    """A part of a layout: its class in sentence-transformers, its configuration, and its weights if it has any."""

    type: str
    config: dict[str, Any]
    module: nn.Module | None = None


def dense_part(part: nn.Module, where: str) -> Part:
    """A dense layer or a normalisation, of what has this name in sentence-transformers."""
    config: dict[str, Any] = {"module_input_name": where, "module_output_name": where}
    if isinstance(part, Dense):
        linear = part.linear
        config |= {"in_features": linear.in_features, "out_features": linear.out_features}
        config |= {"bias": linear.bias is not None, "activation_function": part.activation}
        config |= {"use_residual": True} if part.use_residual else {}
    return Part(f"{_TYPES}{type(part).__name__}", config, part)


def write_layout(folder: Path, parts: Sequence[Part], about: Mapping[str, Any], limits: Mapping[str, Any]) -> None:
    """Write all parts of a folder in sentence-transformers' layout but the model, and what names them.

    Args:
        folder: holds the model, the first part.
        parts: what follows it.
        about, limits: contents of `config_sentence_transformers.json` and of `sentence_bert_config.json`.
    """
    modules = [{"idx": 0, "name": "0", "path": "", "type": f"{_TYPES}Transformer"}]
    for i, (kind, config, module) in enumerate(parts, 1):
        path = f"{i}_{kind.rpartition('.')[2]}"
        if module is not None and any(True for _ in module.parameters()):
            write_weights(folder / path, module.state_dict())
        write_text(folder / path / "config.json", json.dumps(config, indent=2) + "\n")
        modules.append({"idx": i, "name": str(i), "path": path, "type": kind})
    write_text(folder / SETTINGS, json.dumps(about, indent=2) + "\n")
    write_text(folder / TRANSFORMER_SETTINGS, json.dumps(limits, indent=2) + "\n")
    write_text(folder / MODULES, json.dumps(modules, indent=2) + "\n")  # last: it makes the folder a layout


def layers_of(
    source: Source, kind: str, config: dict[str, Any], model: ModernBertModel, others: str
) -> list[nn.Module]:
    """The layer of a part of a folder, on the model's device; none for dropout.

    Args:
        source: the part's own folder.
        kind: see `kind_of_part`.
        config: its configuration.
        model: where its weights are and of which dtype.
        others: the kinds that the caller knows beside these, for the error.
    """
    if kind == "Dense":
        return [_dense(source, config).to(device=model.device, dtype=model.dtype)]
    if kind not in ("Normalize", "Dropout"):
        raise CheckpointError(f"{source.subfolder} is a {kind}; known are {others}, Dense, Normalize, Dropout")
    return [Normalize()] if kind == "Normalize" else []


def refuse_decoder(source: Source) -> None:
    """Raise `CheckpointError` if the model is a decoder, which has no vectors of texts here."""
    model_type = source.holding("config.json").read_json("config.json").get("model_type")
    if model_type == ModernBertDecoderConfig.model_type:
        where = source.folder or source.name_or_folder
        raise CheckpointError(
            f"{where} is a decoder ({model_type}); vectors of texts are made by encoders (modernbert)"
        )


def _dense(source: Source, config: dict[str, Any]) -> Dense:
    """A dense part with its weights."""
    sizes: dict[str, int] = {}
    for name in ("in_features", "out_features"):
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{source.subfolder} has {name} {shown(value)}; it must be a whole number above 0")
        sizes[name] = value
    inputs, outputs = sizes.values()
    has_bias = bool(config.get("bias", True))
    shapes = {"linear.weight": (outputs, inputs)} | ({"linear.bias": (outputs,)} if has_bias else {})
    residual = bool(config.get("use_residual"))
    if residual and inputs != outputs:
        shapes["residual.weight"] = (outputs, inputs)
    files = weight_files(source)
    found = {name: shape for name, (_, shape, _) in weight_names(files).items()}
    if shapes != found:  # before anything of that size is made
        raise CheckpointError(f"{source.subfolder} holds {shown(found)}; its configuration wants {shapes}")
    part = Dense(inputs, outputs, has_bias, config.get("activation_function"), residual)
    part.load_state_dict(dict(read_weights(files, lambda name: True)))
    return part
