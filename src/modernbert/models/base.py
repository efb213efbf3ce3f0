"""What every model can do: load and save itself, resize, prune, checkpoint activations, freeze for inference."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modernbert.config import Config
from modernbert.engines.freeze import freeze
from modernbert.engines.guard import Frozen, is_frozen, thaw
from modernbert.errors import ConfigError, InputError, shown
from modernbert.io.checkpoint import (
    PLAIN,
    QUANTIZED,
    dtype_of,
    names_of,
    read_weights,
    weight_files,
    weight_names,
    write_weights,
)
from modernbert.io.hub import Saved, Source, drop_meaningless
from modernbert.models.adapters import AdapterSource, WithAdapters, as_named
from modernbert.models.formats import KEY, Quantization, weight_format
from modernbert.models.initialization import around_mean, initialize, initialize_weight
from modernbert.models.loading import check_layers, load_weights, mapped_weights
from modernbert.models.placement import resolve_device, resolve_dtype, warn_once
from modernbert.nn.backbone import Backbone
from modernbert.nn.layers import MLP, Attention
from modernbert.nn.recompute import Recompute

logger = logging.getLogger(__name__)

_WITH_PEFT = "PEFT trains adapters: peft.get_peft_model(model, peft.LoraConfig(...)); load_adapter loads what it saves"
_MASKS = "models take the mask (batch, sequence) as it is"
_POSITIONS = "positions are rotary, and have no embedding to resize"
# What models of transformers have and these have not, and what serves here.
_INSTEAD = {
    "add_adapter": _WITH_PEFT,
    **dict.fromkeys(("get_extended_attention_mask", "invert_attention_mask"), _MASKS),
    **dict.fromkeys(("get_position_embeddings", "resize_position_embeddings"), _POSITIONS),
    "dequantize": "load the float checkpoint, which rounding has not changed",
    "to_bettertransformer": "optimize_for_inference() makes a model fast",
    "register_for_auto_class": "nothing from a checkpoint is ever executed",
    "generate": "a model for generation is a ModernBertDecoderForCausalLM",
}


class PreTrainedModel(WithAdapters, Saved, nn.Module):
    """Base of all models.

    A model with a head keeps its encoder in `model`; the encoder is its own `base_model`.

    Args:
        config: the architecture.
        attn_implementation: "auto", "eager", "sdpa", "native", "flash_attention_2" or "flex_attention"; one that
            cannot run here raises `BackendError` with the reason, and "auto" takes what suits the device and dtype.

    Attributes:
        config_class: of the configuration.
        base_model_prefix: what the names of the backbone's weights begin with in a model that has a head.
        tied_weights: parameters that checkpoints leave out, and the one that each shares.
        main_input_name, framework, supports_gradient_checkpointing, is_parallelizable: for tools that ask.
        hf_device_map: where `device_map` put the whole model, {"": "cpu"} or {"": 0}; only if it was given.
        name_or_path: where the weights were loaded from; empty for fresh ones.
        warnings_issued, model_tags: what trainers of other libraries write down.
    """

    main_input_name: ClassVar[str] = "input_ids"
    framework: ClassVar[str] = "pt"
    supports_gradient_checkpointing: ClassVar[bool] = True
    is_parallelizable: ClassVar[bool] = False
    _no_split_modules: ClassVar[list[str]] = ["Layer"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {}
    _keys_to_ignore_on_load_missing = _keys_to_ignore_on_load_unexpected = _keys_to_ignore_on_save = frozenset[str]()
    _keep_in_fp32_modules = _keep_in_fp32_modules_strict = frozenset[str]()
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_set_attn_implementation = classmethod(lambda cls: True)
    _can_set_experts_implementation = classmethod(lambda cls: False)

    config: Config
    config_class: ClassVar[type[Config]]
    base_model_prefix: ClassVar[str] = "model"
    tied_weights: ClassVar[Mapping[str, str]] = {}
    hf_device_map: dict[str, str | int]
    _frozen: Frozen | None = None  # once optimized for inference

    def __init__(self, config: Config, attn_implementation: str | None = "auto") -> None:
        super().__init__()
        self._check_config(config)
        self.config = config.own()
        self.attn_implementation = config.attention_of(attn_implementation)
        self.is_gradient_checkpointing = False

    @classmethod
    def _check_config(cls, config: Config) -> None:
        if not isinstance(config, cls.config_class):
            raise TypeError(f"config is a {type(config).__name__}; {cls.__name__} takes {cls.config_class.__name__}")
        config.check_fits()

    def _finish(self) -> None:
        """Initialize new parameters and tie weights; called at the end of every subclass's `__init__`.

        Parameters of the backbone inside are skipped, and those of an earlier call: their constructors called this.
        """
        if self.base_model is self and not isinstance(
            self, Backbone
        ):  # a class of somebody's own may call its encoder what it likes
            within = (name for name, part in self.named_children() if isinstance(part, Backbone))
            self.base_model_prefix = next(within, self.base_model_prefix)
        prefix = f"{self.base_model_prefix}."
        if self.base_model is not self:
            self.base_model.config = self.config
        own = {name for name, p in self.named_parameters() if not name.startswith(prefix) and not p.is_meta}
        initialize(self, self.config, only=own - self.__dict__.get("_initialized", set()))
        self._initialized = own
        self.tie_weights()
        self.name_or_path = str(getattr(self.config, "name_or_path", ""))
        self.warnings_issued: dict[str, bool] = {}
        self.model_tags: list[str] = []
        self._require_grads_hook: RemovableHandle | None = None
        if getattr(self.config, "gradient_checkpointing", False):  # an older way to ask for it
            self.gradient_checkpointing_enable()
        if self.config.reference_compile and self.base_model is self:
            for module in self.modules():
                if isinstance(module, MLP):
                    module.compile(dynamic=True)

    post_init = _finish  # by this name in a class of somebody's own, which has another head

    def __init_subclass__(cls) -> None:
        cls._tied_weights_keys = dict(cls.tied_weights)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.base_model.first_weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.base_model.first_weight.device

    @property
    def num_labels(self) -> int | None:
        """How many labels the configuration has; setting it sets that."""
        return self.config.num_labels

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        if value != self.config.num_labels:  # names of as many labels stay
            self.config.num_labels = value

    @property
    def vocab_size(self) -> int:
        """How many ids the configuration has."""
        return self.config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.config.vocab_size = value  # which only the same value passes once there are weights

    @property
    def is_activation_checkpointing(self) -> bool:
        """The same as `is_gradient_checkpointing`, by transformers' newer name."""
        return self.is_gradient_checkpointing

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are whole numbers; `quantization` says how."""
        return self.quantization is not None

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """A small batch of ids, to try the model or trace it."""
        return {"input_ids": torch.arange(15, device=self.device).view(3, 5) % self.config.vocab_size}

    @property
    def quantization(self) -> Quantization | None:
        """How the model is quantized, and what was measured then; None if its weights are floats."""
        return weight_format().of_model(self, self.config)

    @property
    def base_model(self) -> Any:
        """The backbone, without a head."""
        return getattr(self, self.base_model_prefix, self)

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the class has `generate`."""
        return hasattr(cls, "generate")

    def get_encoder(self) -> Any:
        """The backbone, as `base_model`; the other of encoder and decoder is the same."""
        return self.base_model

    get_decoder = get_encoder

    def add_model_tags(self, tags: str | list[str]) -> None:
        """Add words about the model, such as the name of a trainer, to `model_tags`."""
        self.model_tags.extend(tag for tag in ([tags] if isinstance(tags, str) else tags) if tag not in self.model_tags)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes that the weights take, tied ones once; `return_buffers` counts buffers as well."""
        held = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        if self.is_quantized:
            held = [*nn.Module.state_dict(copy.deepcopy(self) if is_frozen(self) else self).values()]
        return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in held}.values())

    def get_parameter_or_buffer(self, target: str) -> Tensor:
        """A parameter or buffer by its full name."""
        owner, _, leaf = target.rpartition(".")
        return getattr(self.get_submodule(owner), leaf)

    def set_attn_implementation(self, attn_implementation: str | None) -> None:
        """Attend in another way from now on, by a name that the class takes; ends `optimize_for_inference`.

        Raises:
            ValueError, BackendError: there is no such name, or it cannot run here.
        """
        self.thaw()
        self.base_model.attend_by(attn_implementation)
        self.attn_implementation = self.base_model.attn_implementation

    def follow(self, changed: set[str]) -> None:
        """Called after these fields of the configuration were set."""
        outputs = getattr(getattr(self, "classifier", None), "out_features", None)
        if "num_labels" in changed and outputs not in (None, 1, self.config.num_labels):
            logger.warning(
                "num_labels is %s, and the classifier of this %s gives %s scores: put another in its place, or load it "
                "with num_labels=%s", self.config.num_labels, type(self).__name__, outputs, self.config.num_labels
            )  # fmt: skip

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count parameters, tied ones once; quantized ones too."""
        embedding = self.get_input_embeddings()._parameters.get("weight") if exclude_embeddings else None
        counted = [p for p in self.parameters() if p is not embedding and (p.requires_grad or not only_trainable)]
        quantized = 0 if only_trainable else weight_format().count(self, exclude_embeddings)
        return sum(p.numel() for p in counted) + quantized

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *,
        config: Config | str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        device_map: Any = None,
        attn_implementation: str | None = "auto",
        quantization_config: Any = None,
        adapter: AdapterSource | Mapping[str, AdapterSource] | None = None,
        merge_adapter: bool = False,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        generation_config: Any = None,
        variant: str | None = None,
        revision: str | None = None,
        subfolder: str | None = "",
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **config_overrides: Any,
    ) -> Self:
        """Load a model from a folder or from the Hub, in evaluation mode.

        Weights are read one tensor at a time straight into their dtype and device. Heads that the checkpoint
        lacks, and a classifier for another number of labels than asked for, are freshly initialised, with one
        warning that names them. Tensors that have no place in the model are left out, with another.

        Args:
            pretrained_model_name_or_path: a folder, or a repository id such as "answerdotai/ModernBERT-base"; None with
                `config` and `state_dict`. One that holds a LoRA adapter is loaded together with the base that it names.
            config: a configuration, or where to read it, to use instead of the checkpoint's own.
            dtype: a torch dtype or its name; "auto" and None take the checkpoint's, which is right for inference.
                float16 becomes float32 on a CPU, with a warning. For training give "float32": in bfloat16 and float16
                most steps of an optimizer are smaller than what a weight can show, and are lost.
            torch_dtype: older spelling of `dtype`.
            device: where the weights go; an index means that GPU, or the CPU if there is none.
            device_map: "auto" takes the GPU if there is one; else like `device`.
            attn_implementation: see the class.
            quantization_config: quantize after loading: "int8", "int4", "int8-weight-only", "int4-weight-only", a
                `QuantizationConfig`, or a `BitsAndBytesConfig`. What it costs is measured, on the CPU; see
                `modernbert.quantize`. On a GPU torchao's kernels serve, and nothing is measured.
            adapter: a folder or repository of a LoRA adapter that PEFT saved, or a dict of several by names of your
                own, of which the first acts until `set_adapter`; see `load_adapter`. A classifier in it says how many
                labels there are, unless `num_labels` does.
            merge_adapter: add the one adapter to the weights for good, before anything is quantized; see
                `merge_and_unload`.
            load_in_8bit, load_in_4bit: older spelling of `quantization_config="int8"` and "int4".
            state_dict: weights by their names, instead of the checkpoint's.
            ignore_mismatched_sizes: give random values to weights for which the checkpoint has another shape.
            output_loading_info: return a pair, the model and a dictionary of "missing_keys", "unexpected_keys",
                "mismatched_keys" and "error_msgs".
            generation_config: defaults of `generate`, instead of the checkpoint's.
            variant: read `model.VARIANT.safetensors`.
            revision, subfolder, cache_dir, token, local_files_only, force_download: where to look; see
                `modernbert.io.hub.Source`.
            config_overrides: fields of the configuration to change, such as `num_labels=5`. What transformers takes and
                has no meaning here, such as `trust_remote_code`, is left out with a line of log.

        Raises:
            NotFoundError: no such folder, repository or file.
            CheckpointError: a tensor of the body is missing, or one has the wrong shape, or the weights are a pickle or
                an adapter.
            ConfigError, TypeError: an override is impossible or unknown.
            InputError: an argument asks for what is not served.
            QuantizationError: quantizing would cost more than allowed.
        """
        if quantization_config is None and (load_in_8bit or load_in_4bit):
            quantization_config = "int8" if load_in_8bit else "int4"
        quantization = None if quantization_config is None else weight_format().resolve(quantization_config)
        if isinstance(config, str | Path):
            config = cls.config_class.from_pretrained(config)
        if pretrained_model_name_or_path is None and (config is None or state_dict is None):
            raise InputError("pretrained_model_name_or_path is None; give a name or folder, or config and state_dict")
        origin = str(pretrained_model_name_or_path or "state_dict")
        place = {"revision": revision, "subfolder": subfolder, "cache_dir": cache_dir, "token": token}
        place |= {"local_files_only": local_files_only, "force_download": force_download}
        config_overrides |= {name: value for name, value in place.items() if value is not None}
        source = Source.pop_from(pretrained_model_name_or_path or "", config_overrides)
        base = source.base_of_adapter() if pretrained_model_name_or_path and state_dict is None else None
        if base is not None:
            if adapter is not None:
                raise InputError(f"{origin} is an adapter itself, and adapter is given, too; give its base and both")
            config = config or cls.config_class.from_pretrained(**source.holding("config.json").arguments)
            source, adapter, origin = base, source, str(base.name_or_folder)
        adapters = as_named(adapter)
        if merge_adapter and len(adapters) != 1:
            raise InputError(f"merge_adapter is True with {len(adapters)} adapters; it needs one")
        stored = None
        if pretrained_model_name_or_path and (config is None or source.find("config.json") is not None):
            stored = cls.config_class.from_dict(source.read_json("config.json"), name_or_path=origin)
        config = config or stored
        assert config is not None
        own = {*inspect.signature(cls.__init__).parameters} & {*config_overrides} - {*config.to_dict()}
        more = {name: config_overrides.pop(name) for name in own}  # arguments of a class of somebody's own
        config = config.overridden(config_overrides)
        first = next(iter(adapters.values()), None)
        if first is not None and first.labels and not config_overrides.keys() & {"num_labels", "id2label"}:
            with torch.device("meta"):
                scores = getattr(getattr(cls(config, **more), "classifier", None), "out_features", None)
            config = config.overridden(first.labelling(scores))
        record = weight_format().of_config(config)
        if quantization is not None and record is not None:
            raise ValueError(f"{origin} is quantized already, as {record.scheme}")
        relabelled = stored is None or stored.num_labels != config.num_labels
        files = weight_files(source, variant) if state_dict is None else []
        names = weight_names(files) if state_dict is None else names_of(state_dict)
        check_layers(config.num_hidden_layers, names, origin)
        where = resolve_device(device_map if device is None else device)
        with torch.device("meta"):
            model = cls(config, **more)  # a class of somebody's own may take no more
        fitting = {name: folder.fit(model) for name, folder in adapters.items()}
        brought = next(iter(fitting.values())).values if fitting else ()
        if attn_implementation not in (None, "auto"):
            model.set_attn_implementation(attn_implementation)
        kept_in = dtype_of(names) if record is None else resolve_dtype(config.dtype, None, where)
        wanted = resolve_dtype(dtype if dtype is not None else torch_dtype, kept_in, where)
        model.config.update({"_stored_dtype": config.dtype, "dtype": wanted})
        model.name_or_path = origin if pretrained_model_name_or_path else ""
        if device_map is not None:  # trainers of other libraries leave such a model where it is
            model.hf_device_map = {"": where.type if where.index is None else where.index}

        def read(is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
            given = (state_dict or {}).items()
            return read_weights(files, is_wanted) if state_dict is None else (kv for kv in given if is_wanted(kv[0]))

        with contextlib.nullcontext() if quantization is None else mapped_weights():
            info = load_weights(model, origin, read, names, where, wanted, relabelled, ignore_mismatched_sizes, brought)
            if pretrained_model_name_or_path:
                model.read_more(source)
            if generation_config is not None:
                model.generation_config = generation_config
            model.eval()
            if merge_adapter:
                model.attach_adapters(fitting)
                model.merge_and_unload()
            model = model if quantization is None else weight_format().quantize(model, quantization, source)
        if fitting and not merge_adapter:
            model.attach_adapters(fitting)
        return (model, info) if output_loading_info else model  # type: ignore[return-value]

    @classmethod
    def from_config(
        cls,
        config: Config,
        *,
        attn_implementation: str | None = "auto",
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Make a model with fresh weights; arguments are those of `from_pretrained`.

        Raises:
            TypeError, ConfigError: a field of the configuration is unknown or impossible.
        """
        drop_meaningless(kwargs)
        model = cls(config.overridden(kwargs) if kwargs else config)  # a class of somebody's own may take no more
        if attn_implementation not in (None, "auto"):
            model.set_attn_implementation(attn_implementation)
        given = dtype if dtype is not None else torch_dtype
        return model if given in (None, "auto") else model.to(resolve_dtype(given, None, model.device))

    _from_config = from_config

    def read_more(self, source: Source) -> None:
        """Read what a checkpoint holds for this class beside configuration and weights."""

    def save_more(self, folder: Path) -> None:
        """Write what `read_more` reads."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        variant: str | None = None,
        **kwargs: Any,
    ) -> tuple[str, ...]:
        """Write `config.json` and the weights into a folder, which transformers 4.48 and later read too.

        Every file is written whole under a temporary name and then renamed.

        Args:
            save_directory: the folder; made if it is missing.
            is_main_process: False writes nothing: another process does.
            state_dict: weights to write instead of the model's own.
            push_to_hub: upload the files, too; `kwargs` are then `repo_id`, by default the folder's name, and the other
                arguments of `push_to_hub`.
            max_shard_size: bytes, or a text such as "500MB"; larger models are saved in shards with an index.
            variant: write `model.VARIANT.safetensors`.
            kwargs: `save_function`, `safe_serialization` and others of transformers' change nothing.

        Returns:
            The files.
        """
        if not is_main_process:
            return ()
        options = {"state_dict": state_dict, "max_shard_size": max_shard_size, "variant": variant}
        return self._save(save_directory, options, push_to_hub, kwargs)

    def _write(self, folder: Path, options: Mapping[str, Any]) -> list[Path]:
        plain = copy.deepcopy(self) if is_frozen(self) else self
        given, variant = options["state_dict"], options["variant"]
        if given is None:
            self.refuse_adapters("save_pretrained")
        weights = nn.Module.state_dict(plain) if given is None else dict(given)
        is_quantized = weight_format().state(self, weights)
        if self.config.tie_word_embeddings:
            for tied in self.tied_weights:
                weights.pop(tied, None)
        config = self.config_to_save()
        config.check_fits()
        config.to_json_string()  # a configuration that cannot be saved is refused before anything is written
        self.save_more(folder)
        name = QUANTIZED if is_quantized else PLAIN
        name = name if variant is None else f"{name}.{variant}"
        files = write_weights(folder, weights, options["max_shard_size"], name)
        more = folder / "generation_config.json"
        return [*config._write(folder, {}), *files, *([more] if more.is_file() else [])]

    def config_to_save(self) -> Config:
        """The configuration as a checkpoint holds it: with the class and the dtype of the weights."""
        extra = {name: value for name, value in self.config.extra.items() if name != KEY or self.is_quantized}
        extra["architectures"] = [type(self).__name__]
        return self.config.replace(extra=extra, dtype=str(self.dtype).removeprefix("torch."))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.config.shapes(self)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill all parameters with fresh values, and tie those that are tied. Ends `optimize_for_inference`."""
        self._refuse_quantized("init_weights")
        if "_initialized" not in self.__dict__:  # the end of an `__init__` of somebody's own, as older scripts have it
            self._finish()
            return
        self.thaw()
        initialize(self, self.config, only={name for name, _ in self.named_parameters()})
        self.tie_weights()

    def _init_weights(self, module: nn.Module) -> None:
        """Fill one module's own parameters with fresh values, for `model.apply(model._init_weights)`."""
        name = next((name for name, held in self.named_modules() if held is module), "")
        own = {f"{name}.{leaf}".removeprefix(".") for leaf, _ in module.named_parameters(recurse=False)}
        initialize(self, self.config, only=own)

    # Embeddings

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding, of weight (vocabulary, hidden)."""
        return self.base_model.embeddings.tok_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another token embedding in place; a tied output follows. Ends `optimize_for_inference`."""
        self._refuse_quantized("set_input_embeddings")
        self.thaw()
        self.base_model.embeddings.tok_embeddings = value
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear | None:
        """The layer that gives logits over the vocabulary, or None if the model has none."""
        return getattr(self, "decoder", None)

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Put another output layer in place; one with a weight of its own is no longer tied to the embedding."""
        if self.get_output_embeddings() is None:
            raise TypeError(f"{type(self).__name__} has no output embeddings")
        self._refuse_quantized("set_output_embeddings")
        self.thaw()
        self.decoder = value
        embedding = self.get_input_embeddings()
        if self.config.tie_word_embeddings and value.weight is not embedding.weight:
            self.config = self.base_model.config = self.config.replace(tie_word_embeddings=False)
            self.base_model.embeddings.is_tied = False

    def tie_weights(self) -> None:
        """Let tied parameters share one tensor, if the configuration ties them."""
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

        Ids past the new end are dropped.

        Args:
            new_num_tokens: the new size; None keeps the present one.
            pad_to_multiple_of: round the size up to a multiple of this.
            mean_resizing: draw new embeddings closely around the mean of the old ones, so that at first a new token is
                as likely as a usual one; False initializes them as a fresh model's. The bias of an output that is not
                tied is drawn likewise, that of a tied one is 0.

        Returns:
            The token embedding.

        Raises:
            ValueError: the size is below 1, or leaves the padding id outside, or the model is quantized.
        """
        self._refuse_quantized("resize_token_embeddings")
        self.refuse_adapters("resize_token_embeddings", loaded=True)
        self.thaw()
        embedding = self.get_input_embeddings()
        if new_num_tokens is not None and (not isinstance(new_num_tokens, int) or isinstance(new_num_tokens, bool)):
            raise ValueError(f"new_num_tokens is {shown(new_num_tokens)}; it must be a whole number, or None")
        size = embedding.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            if not isinstance(pad_to_multiple_of, int) or pad_to_multiple_of < 1:
                raise ValueError(
                    f"pad_to_multiple_of is {shown(pad_to_multiple_of)}; it must be a whole number of at least 1"
                )
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if size < 1:
            raise ValueError(f"new_num_tokens is {new_num_tokens}; a vocabulary has at least 1 id")
        if size == embedding.num_embeddings:
            return embedding
        if self.config.pad_token_id is not None and self.config.pad_token_id >= size:
            raise ConfigError(
                f"new_num_tokens is {size}, which leaves pad_token_id {self.config.pad_token_id} outside; choose a "
                "larger number, or another padding id first"
            )
        config = self.config.replace(vocab_size=size)

        def resized(old: Tensor, name: str, around: bool = mean_resizing) -> nn.Parameter:
            new = old.new_zeros((size, *old.shape[1:]))
            if around:
                around_mean(new, old)
            elif old.dim() == 2:
                initialize_weight(new, name, config)
            new[: len(old)] = old[:size]
            return nn.Parameter(new, requires_grad=old.requires_grad)

        embedding.weight = resized(embedding.weight, "tok_embeddings")
        embedding.num_embeddings = size
        output = self.get_output_embeddings()
        if output is not None:
            output.weight = resized(output.weight, "decoder")
            output.out_features = size
            if output.bias is not None:
                output.bias = resized(output.bias, "decoder", mean_resizing and not config.tie_word_embeddings)
        self.config = self.base_model.config = config
        self.tie_weights()
        return embedding

    # Surgery and training

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
        self.refuse_adapters("prune_heads", loaded=True)
        pruned = {**self.config.pruned_heads}
        for layer, heads in heads_to_prune.items():
            pruned[layer] = sorted({*pruned.get(layer, []), *heads})
            if len(pruned[layer]) >= self.config.num_attention_heads:
                raise ValueError(f"prune_heads would remove all {len(pruned[layer])} heads of layer {layer}")
        config = self.config.replace(pruned_heads=pruned)  # refuses layers and heads that do not exist
        self.thaw()
        layers: Any = self.base_model.layers
        for layer in heads_to_prune:
            attention: Attention = layers[layer].attn
            before = self.config.pruned_heads.get(layer, [])
            present = [h for h in range(config.num_attention_heads) if h not in before]
            attention.prune([i for i, head in enumerate(present) if head in pruned[layer]])
        self.config = self.base_model.config = config

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        keep_bytes: int | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute layers in the backward pass instead of keeping their activations; the gradients stay the same.

        `activation_checkpointing_enable` is the same by transformers' newer names.

        Args:
            gradient_checkpointing_kwargs: arguments of `torch.utils.checkpoint.checkpoint`. It always runs with
                `use_reentrant=False`, which gives the gradients of the other way and works in more places.
            keep_bytes: recompute only as many layers as it takes for the others' activations to fit into these bytes.
            every_n_layers: recompute only every layer of such a number, from the first one.
            offload: hold what a recomputed layer begins from in the host's memory.

        Raises:
            ValueError: an argument cannot be served.
        """
        options = dict(gradient_checkpointing_kwargs or {})
        for name, value, least in (("keep_bytes", keep_bytes, 0), ("every_n_layers", every_n_layers, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be a whole number of at least {least}")
        if options.pop("use_reentrant", False):
            logger.info("use_reentrant is True; layers are recomputed without reentering, to the same gradients")
        allowed = ("context_fn", "debug", "determinism_check", "early_stop", "preserve_rng_state")
        if unknown := sorted(options.keys() - {*allowed}):
            raise ValueError(
                f"gradient_checkpointing_kwargs has {', '.join(unknown)}; there are use_reentrant, {', '.join(allowed)}"
            )
        self.is_gradient_checkpointing = self.base_model.is_gradient_checkpointing = True
        self.base_model.recompute = Recompute(keep_bytes, every_n_layers, offload, options)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """See `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, None, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass again."""
        self.is_gradient_checkpointing = self.base_model.is_gradient_checkpointing = False

    activation_checkpointing_disable = gradient_checkpointing_disable

    def enable_input_require_grads(self) -> None:
        """Let what the token embedding gives have a gradient, for adapters above frozen weights."""
        self.disable_input_require_grads()

        def require(module: nn.Module, ids: Any, vectors: Tensor) -> None:
            if torch.is_grad_enabled():
                vectors.requires_grad_()

        self._require_grads_hook = self.get_input_embeddings().register_forward_hook(require)

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        if self._require_grads_hook is not None:
            self._require_grads_hook.remove()
            self._require_grads_hook = None

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
            self.thaw()
        return super().train(mode)

    def _refuse_quantized(self, what: str) -> None:
        if self.quantization is not None:
            raise ValueError(f"{what} needs float weights; the model is quantized ({self.quantization.scheme})")

    # Freezing, and what thaws

    def optimize_for_inference(self) -> Self:
        """Freeze the model to serve: evaluation mode, no gradients, weights laid out once for kernels of our own.

        Changes the model in place and returns it. Results stay the same but for rounding, and a text's do not depend
        on its batch. Saving and copying give plain weights. Whatever would change the weights, or needs the modules
        themselves, thaws the model first, which is then what it was before: training mode, `requires_grad_`, moving,
        loading, resizing, pruning, hooks, gradients by the inputs, autocast, and reading or assigning a layer's weights
        or attributes; `thaw()` does it by hand. A parameter that was taken from `parameters()` has no values
        meanwhile, and raises `FrozenError` if it is used. What shares memory with a weight from before, such as a
        state dict, is no longer followed. `torch.compile` wants a plain model.
        """
        self.eval()
        if self._frozen is None:
            freeze(self, self.base_model)
        return self

    def thaw(self) -> None:
        """Undo `optimize_for_inference`, except for the mode: which parameters have gradients is as it was before.

        A parameter whose gradient was switched off meanwhile stays without.
        """
        thaw(self)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Let all parameters have gradients, or none; ends `optimize_for_inference` if they are to have some."""
        if requires_grad:
            self.thaw()
        elif self._frozen is not None:
            self._frozen.leave_off(self.parameters())
        return super().requires_grad_(requires_grad)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:  # what moves and casts a model
        self.thaw()
        return super()._apply(fn, recurse)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights by their names; see `torch.nn.Module.load_state_dict`. Ends `optimize_for_inference`.

        Tied weights may be left out, as checkpoints leave them out.
        """
        self.thaw()
        if self.config.tie_word_embeddings and isinstance(state_dict, Mapping):
            shared = {name: state_dict[of] for name, of in self.tied_weights.items() if of in state_dict}
            state_dict = state_dict if shared.keys() <= state_dict.keys() else {**shared, **state_dict}
        return super().load_state_dict(state_dict, *args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Weights by their names; see `torch.nn.Module.state_dict`.

        Whoever holds them may write to them, so this ends `optimize_for_inference`; `save_pretrained` does not.
        """
        self.thaw()
        return super().state_dict(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(value, "base_layer") and f"{name}.weight" in self.tied_weights and self.config.tie_word_embeddings:
            raise InputError(
                f"an adapter was put on {name!r}, whose weight is the token embedding's (tie_word_embeddings), which "
                f"merging it would change too; leave it out, with PEFT by exclude_modules=[{name!r}]"
            )
        if (
            self._frozen is not None
            and name not in ("_frozen", "runner", "_adapters")
            and (name != "training" or value)
        ):
            self._frozen.thaw(f"{name!r} of a {type(self).__name__} was set")
        super().__setattr__(name, value)
        if name == "config":
            value.shapes(self)

    def __getattr__(self, name: str) -> Any:
        if name in _INSTEAD:
            raise AttributeError(f"{type(self).__name__} has no {name}; {_INSTEAD[name]}")
        return super().__getattr__(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = new = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        whole = copy.deepcopy(self) if is_frozen(self) else self  # a copy is not frozen
        return super(PreTrainedModel, whole).__reduce_ex__(protocol)


class BareModel(PreTrainedModel, Backbone):
    """A backbone that loads and saves itself; arguments are those of `PreTrainedModel`."""

    def __init__(self, config: Config, attn_implementation: str | None = "auto") -> None:
        self._check_config(config)
        Backbone.__init__(self, config.own(), config.attention_of(attn_implementation))
        self._finish()
