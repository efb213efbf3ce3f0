"""What both configurations share: plain, checked data that reads and writes both generations of `config.json`.

The older generation says `global_attn_every_n_layers`, `global_rope_theta` and `local_rope_theta`; the newer
one says `layer_types` and `rope_parameters`. A configuration accepts either, holds both, and saves both, so
that every release of transformers that knows the architecture reads what is saved here.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import difflib
import functools
import inspect
import json
import logging
import typing
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol, Self, TypeGuard, TypeVar

from modernbert.checks import Limits, check_value, kinds_of, option
from modernbert.errors import ConfigError, shown
from modernbert.io.files import write_text
from modernbert.io.hub import Saved, Source, read_object

logger = logging.getLogger(__name__)

LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
DTYPES = ("float64", "float32", "bfloat16", "float16")
_OTHER_DTYPES = {"double": "float64", "float": "float32", "half": "float16"}  # as torch spells them too
_SPECIAL_IDS = ("pad", "bos", "cls", "sep", "eos")
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh", "sigmoid")
# What a file may ask for: far beyond any model, and far below what fills a machine before an error is met.
_MOST_LAYERS, _MOST_LABELS, _LARGEST = 4096, 2**20, 2**28
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
_DROPOUTS = ("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout")
_LIMITS = {
    **dict.fromkeys(_SIZES, Limits(1, _LARGEST)),
    **dict.fromkeys(_DROPOUTS, Limits(0, below=1)),
    **dict.fromkeys(("norm_eps", "initializer_range", "initializer_cutoff_factor"), Limits(above=0)),
    "num_hidden_layers": Limits(0, _MOST_LAYERS),
    "local_attention": Limits(0, _LARGEST),
    "global_attn_every_n_layers": Limits(1),
    "num_labels": Limits(1, _MOST_LABELS),
}
# Fields that act on every call, whenever they are set.
_ACT_LATER = {
    *(f"{name}_token_id" for name in _SPECIAL_IDS),
    *("num_labels", "id2label", "label2id", "problem_type", "output_attentions", "output_hidden_states"),
    *("return_dict", "dtype", "extra", "initializer_range", "initializer_cutoff_factor", "use_cache"),
    *("classifier_pooling", "sparse_prediction", "sparse_pred_ignore_index", "repad_logits_with_grad"),
    "max_position_embeddings",
}
_OF_LABELS = {"num_labels", "id2label", "label2id", "dtype", "extra"}
# What a change of a field makes anew.
_DERIVED = {
    "num_labels": ("id2label", "label2id"),
    "id2label": ("num_labels", "label2id"),
    "label2id": ("num_labels", "id2label"),
    "num_hidden_layers": ("layer_types",),
    "global_attn_every_n_layers": ("layer_types",),
    "layer_types": ("global_attn_every_n_layers",),
    "rope_parameters": ("global_rope_theta", "local_rope_theta"),
}
# What configurations of transformers hold beside fields, until a file or a caller says otherwise.
_UNLESS_GIVEN: Mapping[str, Any] = MappingProxyType(
    {
        **dict.fromkeys(("architectures", "transformers_version", "base_model_tp_plan", "base_model_pp_plan")),
        "use_cache": False,
        "chunk_size_feed_forward": 0,
    }
)
# Read from other fields, and never set.
_FOLLOWS = {
    "head_dim": "hidden_size and num_attention_heads",
    "num_key_value_heads": "num_attention_heads",
    "rope_theta": "global_rope_theta and local_rope_theta",
    "use_return_dict": "return_dict",
}


class Reach(NamedTuple):
    """How far a token attends, inclusive, in tokens: `left` before itself and `right` after; None has no end."""

    left: int | None
    right: int | None


class Built(Protocol):
    """A model, as its configuration sees it."""

    attn_implementation: str

    @property
    def base_model(self) -> Any: ...

    def set_attn_implementation(self, attn_implementation: str) -> None: ...

    def follow(self, changed: set[str]) -> None:
        """Called after these fields were set."""
        ...


ConfigT = TypeVar("ConfigT", bound="type[Config]")


def keeps_unknown(cls: ConfigT) -> ConfigT:
    """Let the constructor of a configuration take other names of its fields, and keep arguments that are no fields."""
    plain: Any = cls.__init__

    @functools.wraps(plain)
    def init(self: Config, **values: Any) -> None:
        fields, others = self._named(values)
        plain(self, **fields)
        own = [name for name in self.__dict__ if name not in self._names() and not name.startswith("_")]
        # A class of somebody's own may set attributes before; and what is kept is not written into a caller's `extra`.
        self.__dict__["extra"] = {**self.extra, **{name: self.__dict__.pop(name) for name in own}}
        self.update(others)

    cls.__init__ = init  # type: ignore[method-assign]
    return cls


@dataclasses.dataclass(kw_only=True)
class Config(Saved, abc.ABC):
    """The architecture and options of a model; the defaults are those of the base size.

    All arguments are keywords. A field that is set later is checked as at construction, and what is derived from it is
    made anew; fields that contradict each other are refused where a model is built. `config.replace(...)` gives a
    changed copy. A model has a copy of its own, `model.config`: there fields that shaped it can no longer be set, and
    the others act from then on. Whatever is not listed here, as an argument, as
    an attribute or in a `config.json`, is kept in `extra`, can be read as an attribute, and is saved. `hidden_act`,
    `torch_dtype`, `sliding_window` and `attn_implementation` are taken as transformers means them.

    Args:
        vocab_size: rows of the token embedding.
        hidden_size: width of the residual stream; a multiple of `num_attention_heads`, with even heads.
        intermediate_size: width of the gated MLP.
        num_hidden_layers: number of layers.
        num_attention_heads: attention heads a layer.
        hidden_activation: activation of the gated MLP, a name or a function of one tensor.
        max_position_embeddings: longest text, in tokens, that the model was trained for.
        initializer_range: standard deviation of freshly initialised embeddings and input projections.
        initializer_cutoff_factor: initial weights are cut off at this many standard deviations.
        norm_eps: epsilon of the LayerNorms.
        norm_bias: whether the LayerNorms have a bias.
        pad_token_id, eos_token_id, bos_token_id, cls_token_id, sep_token_id: ids of special tokens, or None.
        attention_bias: whether the attention projections have a bias.
        attention_dropout: dropout of attention weights and of the attention output, in [0, 1).
        layer_types: for each layer "full_attention" or "sliding_attention"; wins over
            `global_attn_every_n_layers`, from which it is made where absent.
        rope_parameters: for each layer type {"rope_type", "rope_theta", ...}; wins over
            `global_rope_theta` and `local_rope_theta`, from which it is made where absent. Types: "default",
            "linear" and "dynamic" (with "factor"), "yarn" (with "factor" and optional
            "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
            "mscale_all_dim", "truncate").
        rope_scaling: older spelling of a scaled type; merged into both layer types of `rope_parameters`.
        local_attention: width of the local window, by which `reach` measures.
        global_attn_every_n_layers: layer i attends globally where i is a multiple of this.
        global_rope_theta, local_rope_theta: base periods of the rotary embedding by layer type.
        embedding_dropout, mlp_dropout, classifier_dropout: dropout ratios in [0, 1).
        mlp_bias: whether the MLP projections have a bias.
        decoder_bias: whether the output over the vocabulary has a bias.
        classifier_bias: whether the prediction head's dense layer has a bias.
        classifier_activation: activation of the prediction head.
        deterministic_flash_attn: take attention kernels whose gradients are deterministic.
        reference_compile: True compiles the MLPs with torch.compile; None and False do not.
        tie_word_embeddings: whether the output decoder shares the token embedding.
        num_labels, id2label, label2id, problem_type: of classification heads; two labels if none are given. `id2label`
            may be a list of names, in the order of their ids.
        output_attentions, output_hidden_states, return_dict: defaults of the forward arguments.
        pruned_heads: heads removed from each layer.
        dtype: of the weights, as a torch dtype or its name: float32, bfloat16, float16 or float64; as an attribute it
            is a torch dtype, or None if nothing says.
        extra: unknown keys of the file that the configuration was read from.

    Raises:
        ConfigError: a value is impossible; the message names the field.

    Source: ModernBERT, arXiv:2412.13663, and the reference configuration's documentation.
    """

    model_type: ClassVar[str]
    default_theta: ClassVar[dict[str, float]]  # base period of each layer type if a file does not give it
    attribute_map: ClassVar[dict[str, str]] = {"hidden_act": "hidden_activation", "torch_dtype": "dtype"}
    fixed: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "type_vocab_size": 0,
            **dict.fromkeys(("is_decoder", "is_encoder_decoder", "is_composition", "add_cross_attention"), False),
        }
    )  # what holds of every model, by transformers' names
    sub_configs: ClassVar[dict[str, Any]] = {}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    _name_or_path: ClassVar[str] = ""

    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    hidden_activation: str | Callable[..., Any] = "gelu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    initializer_cutoff_factor: float = 2.0
    norm_eps: float = 1e-5
    norm_bias: bool = False
    pad_token_id: int | None = 50283
    eos_token_id: int | list[int] | None = 50282
    bos_token_id: int | None = 50281
    cls_token_id: int | None = 50281
    sep_token_id: int | None = 50282
    attention_bias: bool = False
    attention_dropout: float = 0.0
    layer_types: list[str] | None = None
    rope_parameters: dict[str, dict[str, Any]] | None = None
    rope_scaling: dataclasses.InitVar[dict[str, Any] | None] = None
    local_attention: int = 128
    global_attn_every_n_layers: int | None = None
    global_rope_theta: float | None = None
    local_rope_theta: float | None = None
    embedding_dropout: float = 0.0
    mlp_bias: bool = False
    mlp_dropout: float = 0.0
    decoder_bias: bool = True
    classifier_dropout: float = 0.0
    classifier_bias: bool = False
    classifier_activation: str | Callable[..., Any] = "gelu"
    deterministic_flash_attn: bool = False
    reference_compile: bool | None = None
    tie_word_embeddings: bool = True
    num_labels: int | None = None
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = option(None, "What the labels are.", choices=PROBLEM_TYPES)
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    pruned_heads: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    dtype: Any = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse a class of somebody's own that is neither an encoder's nor a decoder's."""
        if inspect.isabstract(cls):
            raise TypeError(
                f"{cls.__name__} is no architecture; derive from ModernBertConfig or ModernBertDecoderConfig"
            )
        return super().__new__(cls)

    def __post_init__(self, rope_scaling: dict[str, Any] | None) -> None:
        self._check_types()
        self._check_ids()
        self._derive_dtype()
        self._derive_layer_types()
        self._derive_rope(rope_scaling)
        self._derive_labels()
        self._derive_pruned_heads()
        self.__dict__["_is_checked"] = True

    # Setting

    @classmethod
    def _names(cls) -> list[str]:
        """What the constructor takes as fields."""
        return [*(f.name for f in dataclasses.fields(cls)), "rope_scaling"]

    @classmethod
    def _named(cls, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a caller gives: fields, under their own names, and the rest."""
        names = cls._names()
        fields: dict[str, Any] = {}
        others: dict[str, Any] = {}
        for given, value in values.items():
            name = cls.attribute_map.get(given, given)
            if value is None and name in ("output_attentions", "output_hidden_states", "return_dict"):
                continue
            if given == "sliding_window":
                fields["local_attention"] = _window(value, values.get("local_attention"))
            elif name not in names:
                others[name] = value
            elif given == name or name not in values:
                fields.setdefault(name, value)
        return fields, others

    def update(self, values: Mapping[str, Any], **more: Any) -> None:
        """Set several fields at once; what is no field is kept as an attribute.

        Raises:
            ConfigError: a value is impossible, or a field shaped a model that was built; nothing is set then.
        """
        fields, others = self._named({**values, **more})
        for name in others.keys() & {*_FOLLOWS, *self.fixed, "model_type"}:
            value, held = others.pop(name), getattr(self, name)
            if held != value:
                why = f"follows from {_FOLLOWS[name]}" if name in _FOLLOWS else f"is always {held!r} here"
                raise ConfigError(f"{name} is {shown(value)}; it {why}")
        models, follows = list(self._models().values()), _ACT_LATER
        held = {tuple(layer.kind for layer in model.base_model.layers) for model in models}
        if (
            {len(kinds) for kinds in held} == {fields.get("num_hidden_layers")}
            and len(held) == 1
            and not self.pruned_heads
        ):
            fields.setdefault("layer_types", [*held.pop()])  # layers were taken out of the model, and this says it
            follows = follows | {"num_hidden_layers", "layer_types", "global_attn_every_n_layers"}
        changed = self.replace(**fields) if fields else self
        new = {f.name: getattr(changed, f.name) for f in dataclasses.fields(self)}
        if "extra" not in fields:
            new["extra"] = self.extra
        different = {name for name, value in new.items() if value != getattr(self, name)}
        for field in sorted(different - follows) if models else ():
            name = next((n for n in fields if n == field or field in _DERIVED.get(n, ())), field)
            raise ConfigError(
                f"{name} is set to {shown(fields.get(name))}, which changes {field}, and a model was built with "
                f"{shown(getattr(self, field))}; make another model from config.replace({name}=...)"
            )
        for name in others.keys() & {"attn_implementation", "_attn_implementation"}:
            attention = others.pop(name)
            for model in models:
                if attention not in (None, model.attn_implementation):
                    model.set_attn_implementation(attention)
            self.__dict__["_attention"] = attention
        self.__dict__.update(new)
        if self.__dict__.get("_has_copies") and (acting := different & _ACT_LATER - _OF_LABELS):
            names = ", ".join(sorted(acting))
            logger.warning("%s is set for models that are built from now on; others have it in model.config", names)
        for name, value in others.items():
            self._keep(name, value)
        for model in models if different else ():
            model.follow(different)

    def _keep(self, name: str, value: Any) -> None:
        """Keep what is no field."""
        if name.startswith("_") or name == "name_or_path":
            self.__dict__["_" + name.lstrip("_")] = value
            return
        if name not in self.extra and name not in _UNLESS_GIVEN:
            near = self._near(name)
            hint = f"; did you mean {near[0]}?" if near else ""
            level = logging.WARNING if near else logging.INFO
            logger.log(level, "%s has no %s: it is kept, and changes nothing%s", type(self).__name__, name, hint)
        self.extra[name] = value

    def __setattr__(self, name: str, value: Any) -> None:
        if "_is_checked" not in self.__dict__:
            object.__setattr__(self, name, value)
        else:
            self.update({name: value})

    def __getattr__(self, name: str) -> Any:  # of what is no field
        if name in self.attribute_map:
            return getattr(self, self.attribute_map[name])
        for held in () if name.startswith("__") else (self.fixed, self.__dict__.get("extra") or {}, _UNLESS_GIVEN):
            if name in held:
                return held[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __delattr__(self, name: str) -> None:
        if name not in self.extra:
            raise AttributeError(f"{name!r} cannot be removed; what is no field of {type(self).__name__} can be")
        del self.extra[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __contains__(self, name: object) -> bool:
        return name in self.to_dict()

    def __getitem__(self, name: str) -> Any:
        return self.to_dict()[name]

    def keys(self) -> list[str]:
        """The keys of `to_dict`."""
        return list(self)

    def __getstate__(self) -> dict[str, Any]:  # for copies, which no model was built from
        return {name: value for name, value in self.__dict__.items() if name not in ("_built", "_has_copies")}

    def own(self) -> Self:
        """The configuration of a model that is built now: a copy, unless it is that of a model already."""
        if self._models():
            return self
        self.__dict__["_has_copies"] = True
        return copy.deepcopy(self)

    def shapes(self, model: Built) -> None:
        """While this model lives, fields that shaped it are no longer set, but replaced in a copy."""
        self._models()[id(model)] = model

    def _models(self) -> weakref.WeakValueDictionary[int, Built]:
        built: weakref.WeakValueDictionary[int, Built] = self.__dict__.setdefault(
            "_built", weakref.WeakValueDictionary()
        )
        return built

    # Derived views

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values: as many as of queries."""
        return self.num_attention_heads

    @property
    def rope_theta(self) -> float | None:
        """Base period of the rotary embedding of global layers."""
        return self.global_rope_theta

    @property
    def use_return_dict(self) -> bool:
        """Older name of `return_dict`."""
        return self.return_dict

    @property
    def stored_dtype(self) -> Any:
        """What `dtype` was in the file; it changes to that of the weights once a model was loaded."""
        return self.__dict__.get("_stored_dtype", self.dtype)

    @property
    def name_or_path(self) -> str:
        """Where the configuration was read from; "" if it was not. It is not saved."""
        return str(self._name_or_path)

    @property
    def _attn_implementation(self) -> str | None:
        """How a model attends: the built one, by the name of what "auto" took; or else one that is built from here."""
        if not (models := list(self._models().values())):
            return self.__dict__.get("_attention")
        name = models[-1].attn_implementation
        return str(models[-1].base_model.backend.name) if name == "auto" else name

    def attention_of(self, given: str | None) -> str:
        """How a model that is built now attends, of what its caller gives."""
        return (self.__dict__.get("_attention") if given in (None, "auto") else given) or "auto"

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Self:
        """The configuration itself: there is only text."""
        return self

    @property
    def sliding_window(self) -> int:
        """Half of `local_attention`, which is how far the files of either model mean it to count."""
        return self.local_attention // 2

    @abc.abstractmethod
    def reach(self, layer_type: str) -> Reach:
        """How far a layer of this type attends."""

    # Reading and writing

    def replace(self, **changes: Any) -> Self:
        """Return a copy with these fields changed.

        A change of `num_labels`, of the number of layers or of one generation's fields makes anew what was
        derived from the old value.

        Raises:
            TypeError: there is no such field.
            ConfigError: a value is impossible.
        """
        changes, others = self._named(changes)
        self._refuse_unknown(others)
        if changes.get("num_labels") == self.num_labels and "id2label" not in changes:
            changes.pop("num_labels", None)  # labels keep their names
        values: dict[str, Any] = {f.name: copy.deepcopy(getattr(self, f.name)) for f in dataclasses.fields(self)}
        layers = changes.get("num_hidden_layers", self.num_hidden_layers)
        irregular = self.global_attn_every_n_layers is None and not {*_DERIVED["layer_types"], "layer_types"} & {
            *changes
        }
        if layers != self.num_hidden_layers and irregular:
            raise ConfigError(
                f"num_hidden_layers is {layers}; this model's layer_types follow no rule, so give them too"
            )
        for name, kind in (("global_rope_theta", "full_attention"), ("local_rope_theta", "sliding_attention")):
            if name in changes:  # a scaled type keeps its other values
                values["rope_parameters"][kind]["rope_theta"] = changes[name]
        for name in changes:
            for stale in _DERIVED.get(name, ()):
                if stale not in changes:
                    values[stale] = None
        new = type(self)(**{**values, **changes})
        new.__dict__["extra"] = {**new.extra, **changes.get("extra", values["extra"])}
        new.__dict__.update({name: value for name, value in self.__getstate__().items() if name.startswith("_")})
        return new

    def _near(self, name: str) -> list[str]:
        return difflib.get_close_matches(name, self._names(), 1)

    def _refuse_unknown(self, names: Iterable[str]) -> None:
        for name in names:
            near = self._near(name)
            hint = f"; did you mean {near[0]}?" if near else ";"
            there = ", ".join(sorted(self._names()))
            raise TypeError(f"{type(self).__name__} has no {name}{hint} there are {there}")

    def overridden(self, values: Mapping[str, Any], keep_unknown: bool = False) -> Self:
        """A copy with what a caller of `from_pretrained` gives: fields, and what is kept as an attribute already.

        Raises:
            TypeError: a name is neither; with `keep_unknown`, only where a field has one much like it.
            ConfigError: a value is impossible.
        """
        new = copy.deepcopy(self)
        kept = {*_UNLESS_GIVEN, *_FOLLOWS, *self.fixed, *self.extra, "name_or_path", "attn_implementation"}
        unknown = [name for name in self._named(values)[1] if name not in kept and not name.startswith("_")]
        self._refuse_unknown(name for name in unknown if not keep_unknown or self._near(name))
        new.update(values)
        return new

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> Self:
        """Make a configuration from the content of a `config.json` of either generation.

        Args:
            values: the parsed file; keys that mean nothing here are kept in `extra`.
            overrides: what replaces what the file says; with `return_unused_kwargs=True` the result is a pair, with
                those that have no place here.

        Raises:
            ConfigError: the file is of another model type, or a value is impossible.
        """
        given = copy.deepcopy(dict(values))
        model_type = given.pop("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ConfigError(f"model_type is {shown(model_type)}; {cls.__name__} reads {cls.model_type!r}")
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"} | {"rope_scaling"}
        if "torch_dtype" in given:  # the older spelling; both are written
            given.setdefault("dtype", given["torch_dtype"])
            del given["torch_dtype"]
        if given.get("id2label"):
            given.pop("num_labels", None)
        half = given.pop("sliding_window", None)  # as in the reference, it wins over `local_attention`
        if half is not None:
            given["local_attention"] = _window(half, given.get("local_attention"))
        for name in _SPECIAL_IDS:
            if given.get(f"{name}_token_id") == -1:  # a way to write that there is none
                given[f"{name}_token_id"] = None
        # In a file, null means the default of a field that may not be null itself.
        nullable = {f.name for f in dataclasses.fields(cls) if "None" in str(f.type)} | {"rope_scaling"}
        arguments = {k: v for k, v in given.items() if k in known and (v is not None or k in nullable)}
        extra = {k: v for k, v in given.items() if k not in known and k != "_name_or_path"}
        own = {k: v for k, v in extra.items() if k in inspect.signature(cls).parameters}  # of a class of somebody's own
        config = cls(**arguments, **own, extra=extra)
        wants_unused = overrides.pop("return_unused_kwargs", False)
        unused = {n: v for n, v in config._named(overrides)[1].items() if wants_unused and not hasattr(config, n)}
        overrides = {name: value for name, value in overrides.items() if name not in unused}
        config = config.overridden(overrides, keep_unknown=True) if overrides else config
        return (config, unused) if wants_unused else config  # type: ignore[return-value]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Read `config.json` of a local folder or of a repository on the Hub.

        Args:
            pretrained_model_name_or_path: a folder, a repository id such as "answerdotai/ModernBERT-base", or a file.
            kwargs: `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only` say where to look;
                everything else replaces what the file says. `return_unused_kwargs`: see `from_dict`.

        Raises:
            NotFoundError: there is no such folder, repository or file.
            ConfigError: the file holds an impossible value.
        """
        values, rest = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_dict(values, **{"name_or_path": str(pretrained_model_name_or_path), **rest})

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The content of `config.json`, and the arguments that do not say where it is."""
        path = Path(pretrained_model_name_or_path)
        if path.is_file() and path.suffix == ".json":
            Source.pop_from(path, kwargs)
            return read_object(path), kwargs
        source = Source.pop_from(pretrained_model_name_or_path, kwargs).holding("config.json")
        return source.read_json("config.json"), kwargs

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> Self:
        """Read a file of the form of `config.json`."""
        return cls.from_dict(read_object(Path(json_file)))

    def to_dict(self) -> dict[str, Any]:
        """Everything that `config.json` holds, both generations' spellings included."""
        values: dict[str, Any] = copy.deepcopy(self.extra)
        for field in dataclasses.fields(self):
            if field.name not in ("extra", "num_labels"):
                values[field.name] = copy.deepcopy(getattr(self, field.name))
        values["model_type"] = self.model_type
        values["dtype"] = values["torch_dtype"] = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        values["id2label"] = {str(i): label for i, label in (self.id2label or {}).items()}
        values["pruned_heads"] = {str(i): heads for i, heads in self.pruned_heads.items()}
        # Absent says the same as null here, and readers of either generation take it.
        nullable = ("dtype", "torch_dtype", "problem_type", "global_attn_every_n_layers", "reference_compile")
        for name in nullable:
            if values[name] is None:
                del values[name]
        if not values["pruned_heads"]:
            del values["pruned_heads"]
        return dict(sorted(values.items()))

    def to_diff_dict(self) -> dict[str, Any]:
        """`to_dict` without what a new configuration has."""
        usual = type(self)().to_dict()
        values = self.to_dict().items()
        return {name: v for name, v in values if name == "model_type" or name not in usual or v != usual[name]}

    def to_json_string(self, use_diff: bool = False) -> str:
        """`to_dict`, or `to_diff_dict`, as the text of a `config.json`."""
        for name in ("hidden_activation", "classifier_activation"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} is a function and cannot be saved; use one of {', '.join(ACTIVATIONS)}")
        values = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(values, indent=2, ensure_ascii=False, default=_plain) + "\n"

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = False) -> None:
        """Write `to_json_string` to a file."""
        write_text(Path(json_file_path), self.to_json_string(use_diff))

    def _write(self, folder: Path, options: Mapping[str, Any]) -> list[Path]:
        write_text(folder / "config.json", self.to_json_string())
        return [folder / "config.json"]

    # Construction, step by step

    def _check_types(self) -> None:
        kinds = kinds_of(type(self))
        for field in dataclasses.fields(self):
            kind = kinds[field.name]
            if set(typing.get_args(kind) or (kind,)) <= {bool, int, float, str, type(None)}:
                rule = field.metadata or {"limits": _LIMITS.get(field.name, Limits())}
                value = check_value(field.name, getattr(self, field.name), kind, rule, ConfigError)
                setattr(self, field.name, value)
        for name, held in (("pruned_heads", "lists of heads by layer"), ("extra", "values by name")):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(f"{name} is {shown(getattr(self, name))}; it must hold {held}")
        for name in ("hidden_activation", "classifier_activation"):
            value = getattr(self, name)
            if not callable(value) and value not in ACTIVATIONS:
                raise ConfigError(
                    f"{name} is {shown(value)}; choose one of {', '.join(ACTIVATIONS)} or give a function"
                )

    def check_fits(self) -> None:
        """Raise `ConfigError` if fields contradict each other, which they may while they are set one after another."""
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size is {self.hidden_size}, which is not a multiple of "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"hidden_size {self.hidden_size} over num_attention_heads {self.num_attention_heads} gives "
                f"heads of {self.head_dim}; rotary embeddings need an even size"
            )
        # Only the padding id is used as an index; others may point past a cut vocabulary.
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ConfigError(
                f"pad_token_id is {self.pad_token_id}; the vocabulary has ids 0 to {self.vocab_size - 1} (vocab_size)"
            )

    def _check_ids(self) -> None:
        for name in (f"{special}_token_id" for special in _SPECIAL_IDS):
            ids = getattr(self, name)
            for token_id in ids if name == "eos_token_id" and isinstance(ids, list) else [ids]:
                if token_id is not None and (not _is_whole(token_id) or not 0 <= token_id < 2**31):
                    raise ConfigError(
                        f"{name} is {shown(token_id)}; the vocabulary has ids 0 to {self.vocab_size - 1} (vocab_size)"
                    )

    def _derive_dtype(self) -> None:
        given = self.__dict__["dtype"]
        name = None if given in (None, "auto") else str(given).removeprefix("torch.")
        name = None if name is None else _OTHER_DTYPES.get(name, name)
        if name is not None and name not in DTYPES:
            raise ConfigError(f"dtype is {shown(given)}; choose one of {', '.join(DTYPES)}")
        self.dtype = name

    def _derive_pruned_heads(self) -> None:
        pruned: dict[int, list[int]] = {}
        for layer, heads in self.pruned_heads.items():
            number = int(layer) if str(layer).isdecimal() and len(str(layer)) < 10 else -1
            if not 0 <= number < self.num_hidden_layers:
                raise ConfigError(
                    f"pruned_heads names layer {shown(layer)}; there are layers 0 to {self.num_hidden_layers - 1}"
                )
            whole = isinstance(heads, list | tuple | set) and all(map(_is_whole, heads))
            if not whole or not all(0 <= head < self.num_attention_heads for head in heads):
                raise ConfigError(
                    f"pruned_heads names heads {shown(heads)} of layer {layer}; there are heads 0 to "
                    f"{self.num_attention_heads - 1}"
                )
            pruned[number] = sorted(set(heads))
        self.pruned_heads = pruned

    def _derive_layer_types(self) -> None:
        every = self.global_attn_every_n_layers
        if self.layer_types is None:
            self.global_attn_every_n_layers = every or 3
            kinds = [LAYER_TYPES[bool(i % (every or 3))] for i in range(self.num_hidden_layers)]
            self.layer_types = kinds
            return
        if not isinstance(self.layer_types, list | tuple):
            raise ConfigError(f"layer_types is {shown(self.layer_types)}; it must be a list with a name for each layer")
        kinds = list(self.layer_types)
        for i, kind in enumerate(kinds):
            if kind not in LAYER_TYPES:
                raise ConfigError(f"layer_types[{i}] is {shown(kind)}; choose one of {', '.join(LAYER_TYPES)}")
        if len(kinds) != self.num_hidden_layers:
            raise ConfigError(f"layer_types names {len(kinds)} layers; num_hidden_layers is {self.num_hidden_layers}")
        self.layer_types = kinds
        # Say it in the older way too where that way can say it: n, 2n, 3n ... are global and no others.
        fits = [
            n
            for n in (every or 3, *range(1, len(kinds) + 1))
            if kinds == [LAYER_TYPES[bool(i % n)] for i in range(len(kinds))]
        ]
        self.global_attn_every_n_layers = fits[0] if fits else None

    def _derive_rope(self, rope_scaling: dict[str, Any] | None) -> None:
        for name, value in (("rope_parameters", self.rope_parameters), ("rope_scaling", rope_scaling)):
            if value is not None and not isinstance(value, Mapping):
                raise ConfigError(f"{name} is {shown(value)}; it must hold values by name")
        given = dict(self.rope_parameters or {})
        if given and not any(isinstance(given.get(kind), dict) for kind in LAYER_TYPES):
            # One flat dictionary means both layer types, as in models with a single rotary embedding.
            given = {kind: dict(given) for kind in LAYER_TYPES}
        unknown = set(given) - set(LAYER_TYPES)
        if unknown:
            raise ConfigError(f"rope_parameters has {shown(sorted(unknown))}; it is keyed by {', '.join(LAYER_TYPES)}")
        older = {"full_attention": self.global_rope_theta, "sliding_attention": self.local_rope_theta}
        parameters: dict[str, dict[str, Any]] = {}
        for kind in LAYER_TYPES:
            if not isinstance(given.get(kind) or {}, Mapping):
                raise ConfigError(f"rope_parameters[{kind!r}] is {shown(given[kind])}; it must hold values by name")
            rope = {**(given.get(kind) or {}), **(rope_scaling or {})}
            rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
            if rope.get("rope_theta") is None:
                rope["rope_theta"] = self.default_theta[kind] if older[kind] is None else older[kind]
            if rope["rope_type"] == "yarn":
                rope.setdefault("original_max_position_embeddings", self.max_position_embeddings)
            self._check_rope(kind, rope)
            parameters[kind] = rope
        self.rope_parameters = parameters
        self.global_rope_theta = parameters["full_attention"]["rope_theta"]
        self.local_rope_theta = parameters["sliding_attention"]["rope_theta"]

    def _check_rope(self, kind: str, rope: dict[str, Any]) -> None:
        where = f"rope_parameters[{kind!r}]"
        if rope["rope_type"] not in ROPE_TYPES:
            choices = ", ".join(ROPE_TYPES)
            raise ConfigError(f"{where} has rope_type {shown(rope['rope_type'])}; choose one of {choices}")

        def check(name: str, value_kind: Any = float, **limits: float) -> None:
            rule = {"limits": Limits(**limits, most=1e15)}
            value = check_value(f"{where}[{name!r}]", rope.get(name), value_kind, rule, ConfigError)
            if isinstance(rope.get(name), str):  # other numbers stay as they are written
                rope[name] = value

        is_yarn = rope["rope_type"] == "yarn"
        check("rope_theta", **{"above" if is_yarn else "least": 1})
        if rope["rope_type"] != "default":
            check("factor", least=1)
        if is_yarn:
            check("original_max_position_embeddings", least=1)
            for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
                check(name, float | None, least=0)
            check("truncate", bool | None)
        if rope["rope_type"] == "dynamic" and self.head_dim < 4:
            raise ConfigError(f"{where} has rope_type 'dynamic', which needs heads of at least 4, not {self.head_dim}")

    def _derive_labels(self) -> None:
        names: Any = self.id2label
        if isinstance(names, list | tuple):
            names = dict(enumerate(names))
        for field, mapping in (("id2label", names), ("label2id", self.label2id)):
            if mapping is not None and not isinstance(mapping, Mapping):
                raise ConfigError(f"{field} is {shown(mapping)}; it must hold ids and labels")
        if names is not None:
            if not all(str(i).isdecimal() and len(str(i)) < 10 for i in names) or not names:
                raise ConfigError(f"id2label has the ids {shown(list(names))}; they must be 0, 1, 2, ...")
            labels = {int(i): _label(int(i), label) for i, label in names.items()}
            if sorted(labels) != list(range(len(labels))):
                raise ConfigError(f"id2label has the ids {shown(sorted(labels))}; they must be 0, 1, 2, ...")
            labels = dict(sorted(labels.items()))
            if self.num_labels is not None and self.num_labels != len(labels):
                raise ConfigError(f"num_labels is {shown(self.num_labels)} and id2label names {len(labels)}")
        else:
            number = self.num_labels
            if number is None:
                number = len(self.label2id) if self.label2id else 2
            labels = {i: f"LABEL_{i}" for i in range(number)}
            if self.label2id:
                ids = list(self.label2id.values())
                if not all(map(_is_whole, ids)) or sorted(ids) != list(range(number)):
                    raise ConfigError(f"label2id has the ids {shown(ids)}; they must be 0 to {number - 1}")
                inverse = {i: _label(i, label) for label, i in self.label2id.items()}
                labels = {i: inverse[i] for i in range(number)}
        self.id2label = labels
        self.num_labels = len(labels)
        if self.label2id is None or {str(i) for i in self.label2id.values()} != set(map(str, labels)):
            self.label2id = {label: i for i, label in labels.items()}


def _window(half: Any, whole: Any) -> int:
    """`local_attention` where `sliding_window`, the half of it, is given."""
    half = check_value("sliding_window", half, int, {"limits": Limits(0, _LARGEST // 2)}, ConfigError)
    return whole if _is_whole(whole) and whole // 2 == half else 2 * half


def _label(number: int, name: Any) -> str:
    """A label's name; one that a file leaves null has its number's."""
    if name is None:
        return f"LABEL_{number}"
    if isinstance(name, str | int | float):
        return str(name)
    raise ConfigError(f"id2label names label {number} {shown(name)}; it must be a text")


def _torch_dtype(self: Config) -> Any:
    """The weights' dtype, or None if nothing says."""
    name = self.__dict__["dtype"]
    if not isinstance(name, str):
        return name
    import torch  # not before somebody asks

    return getattr(torch, name)


Config.dtype = property(_torch_dtype, lambda self, value: self.__dict__.update(dtype=value))


def _plain(value: Any) -> Any:
    """What stands in JSON for a value of a caller's that has no form of its own there."""
    if callable(getattr(value, "to_dict", None)):
        return value.to_dict()
    if str(value).startswith("torch."):
        return str(value).removeprefix("torch.")
    raise ConfigError(f"the configuration holds {shown(value)}, which cannot be saved")


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
