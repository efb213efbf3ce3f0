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
import json
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeGuard

from modernbert.checks import Limits, check_value, kinds_of, option
from modernbert.errors import ConfigError, shown
from modernbert.io.files import write_text
from modernbert.io.hub import Source

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
    *("id2label", "label2id", "problem_type", "output_attentions", "output_hidden_states", "return_dict"),
    *("dtype", "extra", "initializer_range", "initializer_cutoff_factor", "use_cache", "classifier_pooling"),
    *("sparse_prediction", "sparse_pred_ignore_index", "repad_logits_with_grad"),
}


class Reach(NamedTuple):
    """How far a token attends, inclusive, in tokens: `left` before itself and `right` after; None has no end."""

    left: int | None
    right: int | None


@dataclasses.dataclass(kw_only=True)
class Config(abc.ABC):
    """The architecture and options of a model; the defaults are those of the base size.

    All arguments are keywords. A field that is set later is checked as at construction, and what is derived from it is
    made anew; `config.replace(...)` gives a changed copy. Once a model was built, fields that shaped it can only be
    changed in a copy, for another model. Keys of a `config.json` that are not listed here are kept in `extra` and
    written back when saved.

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
        dtype: name of the dtype that the weights were saved in: "float32", "bfloat16", "float16" or "float64".
        extra: unknown keys of the file that the configuration was read from.

    Raises:
        ConfigError: a value is impossible; the message names the field.

    Source: ModernBERT, arXiv:2412.13663, and the reference configuration's documentation.
    """

    model_type: ClassVar[str]
    default_theta: ClassVar[dict[str, float]]  # base period of each layer type if a file does not give it

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
    dtype: str | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self, rope_scaling: dict[str, Any] | None) -> None:
        self._check_types()
        self._check_sizes()
        self._derive_dtype()
        self._derive_layer_types()
        self._derive_rope(rope_scaling)
        self._derive_labels()
        self._derive_pruned_heads()
        self.__dict__["_is_checked"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "_is_checked" not in self.__dict__:
            object.__setattr__(self, name, value)
            return
        if name not in {field.name for field in dataclasses.fields(self)}:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}; `extra` holds what is not listed")
        changed = self.replace(**{name: value})
        if self.__dict__.get("_has_model"):
            for field in dataclasses.fields(self):
                old, new = getattr(self, field.name), getattr(changed, field.name)
                if old != new and field.name not in _ACT_LATER:
                    raise ConfigError(
                        f"{name} is set to {shown(value)}, which changes {field.name}, and a model was built with "
                        f"{shown(old)}; make another model from config.replace({name}=...)"
                    )
        self.__dict__.update({field.name: getattr(changed, field.name) for field in dataclasses.fields(self)})

    def __getstate__(self) -> dict[str, Any]:  # for copies, which no model was built from
        return {name: value for name, value in self.__dict__.items() if name != "_has_model"}

    def shapes_a_model(self) -> None:
        """From now on fields that shape a model are no longer set, but replaced in a copy."""
        self.__dict__["_has_model"] = True

    # Derived views

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

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
        names = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f"; did you mean {near[0]}?" if near else ";"
                raise TypeError(f"{type(self).__name__} has no {name}{hint} there are {', '.join(sorted(names))}")
        derived = {
            "num_labels": ("id2label", "label2id"),
            "id2label": ("num_labels", "label2id"),
            "num_hidden_layers": ("layer_types",),
            "global_attn_every_n_layers": ("layer_types",),
            "layer_types": ("global_attn_every_n_layers",),
            "rope_parameters": ("global_rope_theta", "local_rope_theta"),
        }
        values: dict[str, Any] = {f.name: copy.deepcopy(getattr(self, f.name)) for f in dataclasses.fields(self)}
        layers = changes.get("num_hidden_layers", self.num_hidden_layers)
        irregular = self.global_attn_every_n_layers is None and not {*derived["layer_types"], "layer_types"} & {
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
            for stale in derived.get(name, ()):
                if stale not in changes:
                    values[stale] = None
        return type(self)(**{**values, **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> Self:
        """Make a configuration from the content of a `config.json` of either generation.

        Args:
            values: the parsed file; keys that mean nothing here are kept in `extra`.
            overrides: fields that replace what the file says.

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
            half = check_value("sliding_window", half, int, {"limits": Limits(0, _LARGEST // 2)}, ConfigError)
            whole = given.get("local_attention")
            if not _is_whole(whole) or whole // 2 != half:
                given["local_attention"] = 2 * half
        for name in _SPECIAL_IDS:
            if given.get(f"{name}_token_id") == -1:  # a way to write that there is none
                given[f"{name}_token_id"] = None
        # In a file, null means the default of a field that may not be null itself.
        nullable = {f.name for f in dataclasses.fields(cls) if "None" in str(f.type)} | {"rope_scaling"}
        arguments = {k: v for k, v in given.items() if k in known and (v is not None or k in nullable)}
        config = cls(**arguments, extra={k: v for k, v in given.items() if k not in known})
        return config.replace(**overrides) if overrides else config

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, **kwargs: Any) -> Self:
        """Read `config.json` of a local folder or of a repository on the Hub.

        Args:
            name_or_folder: a folder, or a repository id such as "answerdotai/ModernBERT-base".
            kwargs: `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only` say where to look;
                everything else replaces what the file says.

        Raises:
            NotFoundError: there is no such folder, repository or file.
            ConfigError: the file holds an impossible value.
        """
        source = Source.pop_from(name_or_folder, kwargs)
        return cls.from_dict(source.read_json("config.json"), **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Everything that `config.json` holds, both generations' spellings included."""
        values: dict[str, Any] = copy.deepcopy(self.extra)
        for field in dataclasses.fields(self):
            if field.name not in ("extra", "num_labels"):
                values[field.name] = copy.deepcopy(getattr(self, field.name))
        values["model_type"] = self.model_type
        values["id2label"] = {str(i): label for i, label in (self.id2label or {}).items()}
        values["pruned_heads"] = {str(i): heads for i, heads in self.pruned_heads.items()}
        if self.dtype is not None:
            values["torch_dtype"] = self.dtype
        # Absent says the same as null here, and readers of either generation take it.
        nullable = ("dtype", "problem_type", "global_attn_every_n_layers", "reference_compile")
        for name in nullable:
            if values[name] is None:
                del values[name]
        if not values["pruned_heads"]:
            del values["pruned_heads"]
        return dict(sorted(values.items()))

    def to_json_string(self) -> str:
        """`to_dict` as the text of a `config.json`."""
        for name in ("hidden_activation", "classifier_activation"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} is a function and cannot be saved; use one of {', '.join(ACTIVATIONS)}")
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` into a folder, which is made where missing."""
        write_text(Path(folder) / "config.json", self.to_json_string())

    # Construction, step by step

    def _check_types(self) -> None:
        kinds = kinds_of(type(self))
        for field in dataclasses.fields(self):
            kind = kinds[field.name]
            if field.name != "dtype" and set(typing.get_args(kind) or (kind,)) <= {bool, int, float, str, type(None)}:
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

    def _check_sizes(self) -> None:
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
        for name in (f"{special}_token_id" for special in _SPECIAL_IDS):
            ids = getattr(self, name)
            # Only the padding id is used as an index; others may point past a cut vocabulary.
            most = self.vocab_size if name == "pad_token_id" else 2**31
            for token_id in ids if name == "eos_token_id" and isinstance(ids, list) else [ids]:
                if token_id is not None and (not _is_whole(token_id) or not 0 <= token_id < most):
                    raise ConfigError(
                        f"{name} is {shown(token_id)}; the vocabulary has ids 0 to {self.vocab_size - 1} (vocab_size)"
                    )

    def _derive_dtype(self) -> None:
        name = None if self.dtype in (None, "auto") else str(self.dtype).removeprefix("torch.")
        name = None if name is None else _OTHER_DTYPES.get(name, name)
        if name is not None and name not in DTYPES:
            raise ConfigError(f"dtype is {shown(self.dtype)}; choose one of {', '.join(DTYPES)}")
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
        ids = list((self.label2id or {}).values())
        if self.label2id is None or not all(map(_is_whole, ids)) or set(ids) != set(labels):
            self.label2id = {label: i for i, label in labels.items()}


def _label(number: int, name: Any) -> str:
    """A label's name; one that a file leaves null has its number's."""
    if name is None:
        return f"LABEL_{number}"
    if isinstance(name, str | int | float):
        return str(name)
    raise ConfigError(f"id2label names label {number} {shown(name)}; it must be a text")


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
