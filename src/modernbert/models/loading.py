"""Checkpoints into models and back: names matched, shapes checked, nothing held twice."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from modernbert.config import Config
from modernbert.engines.guard import is_frozen
from modernbert.errors import CheckpointError, listed
from modernbert.io.checkpoint import (
    PLAIN,
    QUANTIZED,
    dtype_of,
    read_weights,
    weight_files,
    weight_names,
    write_weights,
)
from modernbert.io.hub import Source
from modernbert.models.formats import KEY, weight_format
from modernbert.models.initialization import initialize
from modernbert.models.placement import resolve_device, resolve_dtype

logger = logging.getLogger("modernbert.models.base")

# Every head's parameters begin with one of these. A checkpoint of another head may hold them beside the encoder.
_HEADS = ("head.", "lm_head.", "decoder.", "classifier.")
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # other dtypes stand for nothing by themselves
# What wrappers of PyTorch's put into names: parallel training, the compiler, recomputation.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,6})\.")
_FRESH = 2**26  # numbers that a file may ask for beside those that it holds


class Checkpointed(nn.Module):
    """A model that loads and saves itself.

    Attributes:
        config: the architecture.
        config_class: of the configuration.
        base_model_prefix: what the names of the backbone's weights begin with in a model that has a head.
        tied_weights: parameters that checkpoints leave out, and the one that each shares.
    """

    config: Config
    config_class: ClassVar[type[Config]]
    base_model_prefix: ClassVar[str] = "model"
    tied_weights: ClassVar[Mapping[str, str]] = {}

    def __init__(self, config: Config, attn_implementation: str | None = "auto") -> None:
        super().__init__()
        self._check_config(config)
        config.shapes_a_model()
        self.config = config
        self.attn_implementation = attn_implementation or "auto"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.config.shapes_a_model()

    @classmethod
    def _check_config(cls, config: Config) -> None:
        if not isinstance(config, cls.config_class):
            raise TypeError(f"config is a {type(config).__name__}; {cls.__name__} takes {cls.config_class.__name__}")

    def tie_weights(self) -> None:
        """Let tied parameters share one tensor, where the configuration ties them."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        config: Config | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        device_map: Any = None,
        attn_implementation: str | None = "auto",
        quantization_config: Any = None,
        revision: str | None = None,
        subfolder: str = "",
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **config_overrides: Any,
    ) -> Self:
        """Load a model from a folder or from the Hub, in evaluation mode.

        Weights are read one tensor at a time straight into their dtype and device. Heads that the checkpoint
        lacks, and a classifier for another number of labels than asked for, are freshly initialised, with one
        warning that names them.

        Args:
            name_or_folder: a folder, or a repository id such as "answerdotai/ModernBERT-base".
            config: a configuration to use instead of the checkpoint's own.
            dtype: a torch dtype or its name; "auto" and None take the checkpoint's, which is right for inference.
                float16 becomes float32 on a CPU, with a warning. For training give "float32": in bfloat16 and float16
                most steps of an optimizer are smaller than what a weight can show, and are lost.
            torch_dtype: older spelling of `dtype`.
            device: where the weights go; an index means that GPU, or the CPU where there is none.
            device_map: "auto" takes the GPU where there is one; else like `device`.
            attn_implementation: see the class.
            quantization_config: quantize after loading: "int8", "int4", "int8-weight-only", "int4-weight-only", a
                `QuantizationConfig`, or a `BitsAndBytesConfig`. What it costs is measured, on the CPU; see
                `modernbert.quantize`. On a GPU torchao's kernels serve, and nothing is measured.
            revision, subfolder, cache_dir, token, local_files_only: where to look; see `modernbert.io.hub.Source`.
            config_overrides: fields of the configuration to change, such as `num_labels=5`.

        Raises:
            NotFoundError: no such folder, repository or file.
            CheckpointError: a tensor has no place in the model or the wrong shape, or the weights are a pickle or an
                adapter. What has no place is refused: without it the model would be another one than was saved.
            ConfigError, TypeError: an override is impossible or unknown.
            QuantizationError: quantizing would cost more than allowed.
        """
        quantization = None if quantization_config is None else weight_format().resolve(quantization_config)
        source = Source(name_or_folder, revision, subfolder or "", cache_dir, token, local_files_only)
        stored = None
        if config is None or source.find("config.json") is not None:
            stored = cls.config_class.from_dict(source.read_json("config.json"))
        config = config or stored
        assert config is not None
        for name, scheme in (("load_in_8bit", "int8"), ("load_in_4bit", "int4")):
            if name in config_overrides:
                raise TypeError(f"{name} is no argument here; give quantization_config={scheme!r}")
        if config_overrides:
            config = config.replace(**config_overrides)
        record = weight_format().of_config(config)
        if quantization is not None and record is not None:
            raise ValueError(f"{name_or_folder} is quantized already, as {record.scheme}")
        relabelled = stored is None or stored.num_labels != config.num_labels
        files = weight_files(source)
        names = weight_names(files)
        check_layers(config.num_hidden_layers, names, str(name_or_folder))
        place = resolve_device(device_map if device is None else device)
        with torch.device("meta"):
            model = cls(config, attn_implementation)
        kept_in = dtype_of(names) if record is None else resolve_dtype(config.dtype, None, place)
        wanted = resolve_dtype(dtype if dtype is not None else torch_dtype, kept_in, place)
        load_weights(model, str(name_or_folder), files, names, place, wanted, relabelled)
        model.read_more(source)
        model.eval()
        return model if quantization is None else weight_format().quantize(model, quantization, source)

    def read_more(self, source: Source) -> None:
        """Read what a checkpoint holds for this class beside configuration and weights."""

    def save_more(self, folder: Path) -> None:
        """Write what `read_more` reads."""

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = "5GB") -> None:
        """Write `config.json` and the weights into a folder, which transformers 4.48 and later read too.

        Every file is written whole under a temporary name and then renamed.

        Args:
            folder: made where missing.
            max_shard_size: bytes, or a text such as "500MB"; larger models are saved in shards with an index.
        """
        plain = copy.deepcopy(self) if is_frozen(self) else self
        weights = nn.Module.state_dict(plain)
        is_quantized = weight_format().state(self, weights)
        if self.config.tie_word_embeddings:
            for tied in self.tied_weights:
                weights.pop(tied, None)
        extra = {name: value for name, value in self.config.extra.items() if name != KEY or is_quantized}
        config = self.config.replace(
            extra={**extra, "architectures": [type(self).__name__]},
            dtype=str(self.dtype).removeprefix("torch."),
        )
        config.to_json_string()  # a configuration that cannot be saved is refused before anything is written
        self.save_more(Path(folder))
        write_weights(Path(folder), weights, max_shard_size, QUANTIZED if is_quantized else PLAIN)
        config.save_pretrained(folder)


def check_layers(layers: int, names: Iterable[str], origin: str) -> None:
    """Refuse a checkpoint that holds fewer layers than its configuration names, before a model of that size is made."""
    held = {int(found[1]) for name in names if (found := _LAYER.search(name))}
    if layers > len(held):
        raise CheckpointError(
            f"{origin} is incomplete; num_hidden_layers is {layers}, and its weights hold {len(held)} layers"
        )


def load_weights(
    model: Checkpointed,
    origin: str,
    files: list[Path],
    names: Mapping[str, tuple[Path, tuple[int, ...], str]],
    device: torch.device,
    dtype: torch.dtype,
    relabelled: bool,
) -> None:
    """Read a checkpoint into a model on the meta device, one tensor at a time.

    Args:
        model: as built from the configuration.
        origin: what the checkpoint is called in messages.
        files: its safetensors files.
        names: what they hold; see `checkpoint.weight_names`.
        device: where the weights go.
        dtype: of those that are floats.
        relabelled: whether another number of labels is wanted than the checkpoint has.

    Raises:
        CheckpointError: a tensor is unexpected, missing or has the wrong shape. A tensor that has no place in the model
            is refused, not left out: without it the model would be another one than was saved.
    """
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    target = _match_names(model, origin, names, shapes)
    quantized = weight_format().claims(model, names, target)
    kept: dict[str, str] = {}  # name in the checkpoint -> name in the model
    unexpected: list[str] = []
    misshapen: list[str] = []
    passed_over: list[str] = []
    for name, (_, shape, kind) in names.items():
        mine = target(name)
        if name not in quantized and kind not in _FLOATS:
            (passed_over if mine.startswith(_HEADS) else unexpected).append(f"{name} ({kind})")
            continue
        if name in quantized or (mine in model.tied_weights and model.config.tie_word_embeddings):
            continue  # some writers store a tied weight twice
        if mine not in shapes:
            (passed_over if mine.startswith(_HEADS) else unexpected).append(name)
        elif shapes[mine] != shape:
            if relabelled and mine.startswith("classifier."):
                continue
            misshapen.append(f"{name} is {tuple(shape[:4])}, the model wants {shapes[mine]}")
        else:
            kept[name] = mine
    if unexpected or misshapen:
        what = [f"unexpected: {listed(unexpected)}"] if unexpected else []
        what += [listed(misshapen, most=3)] if misshapen else []
        raise CheckpointError(f"{origin} does not fit {type(model).__name__}; {'; '.join(what)}")
    if passed_over:
        logger.info("%s: weights of another head are left out: %s", origin, listed(passed_over))

    def place(name: str, value: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value))

    parts: dict[str, Tensor] = {}
    for name, tensor in read_weights(files, lambda name: name in kept or name in quantized):
        if name in quantized:
            parts[quantized[name]] = tensor.to(device=device, copy=True)
        else:
            place(kept[name], tensor.to(device=device, dtype=dtype, copy=True))
    weight_format().put(model, origin, parts, dtype)
    model.tie_weights()
    missing = {name for name, p in model.named_parameters() if p.is_meta}
    prefix = f"{model.base_model_prefix}."
    lost = sorted(name for name in missing if not name.startswith(_HEADS))
    if lost:
        raise CheckpointError(f"{origin} is incomplete; it lacks {listed(n.removeprefix(prefix) for n in lost)}")
    fresh = sum(math.prod(shapes[name]) for name in missing)
    if not relabelled and fresh > max(_FRESH, sum(math.prod(shape) for _, shape, _ in names.values())):
        raise CheckpointError(
            f"{origin} asks for {fresh:,} numbers that it does not hold, for {listed(sorted(missing))}; where they are "
            "wanted fresh, say so: num_labels=..."
        )
    for name in missing:
        place(name, torch.empty(shapes[name], device=device, dtype=dtype))
    if quantized:
        model.requires_grad_(False)
    if missing:
        initialize(model, model.config, only=missing)
        logger.warning(
            "%s has no weights that fit %s; they are freshly initialised", origin, listed(sorted(missing), most=8)
        )


def _match_names(
    model: Checkpointed, origin: str, names: Iterable[str], shapes: Mapping[str, Any]
) -> Callable[[str], str]:
    """How the checkpoint's names become this model's.

    A bare encoder's names have no `model.` prefix, wrappers of PyTorch's put words into names, and of a tied pair some
    writers keep the output's name alone.
    """
    prefix = f"{model.base_model_prefix}."
    plain = {name: _WRAPPERS.sub("", name) for name in names}
    if len(set(plain.values())) < len(plain):
        twice = sorted(name for name in plain if name != plain[name] and plain[name] in plain)
        raise CheckpointError(f"{origin} holds tensors twice, as they are and with a wrapper's name: {listed(twice)}")
    theirs = any(name.startswith(prefix) for name in plain.values())
    ours = any(name.startswith(prefix) for name in shapes)

    def place(name: str) -> str:
        if theirs and not ours:
            return name.removeprefix(prefix)
        return prefix + name if ours and not theirs and not name.startswith(_HEADS) else name

    matched = {name: place(of) for name, of in plain.items()}
    embedding = f"{prefix if ours else ''}embeddings.tok_embeddings.weight"
    if model.config.tie_word_embeddings and embedding not in matched.values():
        matched |= {name: embedding for name, of in plain.items() if of == "decoder.weight"}
    return matched.__getitem__
