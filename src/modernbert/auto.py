"""Classes that pick the right one by a checkpoint's `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import modernbert
from modernbert import quantization
from modernbert.config import Config
from modernbert.errors import ConfigError, InputError, shown
from modernbert.io.hub import ADAPTER, Source
from modernbert.models.adapters import with_base
from modernbert.models.base import PreTrainedModel
from modernbert.models.sentence_encoder import SentenceEncoder
from modernbert.models.sentence_layout import CROSS_ENCODER, MODEL, contents_of
from modernbert.text.tokenizer import Tokenizer

quantization.register()  # whatever is loaded here may be quantized

# model_type -> exported class, for each kind of model. A new architecture or head is one entry.
_CONFIGS: dict[str, str | type[Config]] = {
    "modernbert": "ModernBertConfig",
    "modernbert-decoder": "ModernBertDecoderConfig",
}
_MODELS: dict[str, dict[str, str | type[PreTrainedModel]]] = {
    "base": {"modernbert": "ModernBertModel", "modernbert-decoder": "ModernBertDecoderModel"},
    "causal-lm": {"modernbert-decoder": "ModernBertDecoderForCausalLM"},
    "masked-lm": {"modernbert": "ModernBertForMaskedLM"},
    "pretraining": {"modernbert": "ModernBertForMaskedLM", "modernbert-decoder": "ModernBertDecoderForCausalLM"},
    "sequence-classification": {
        "modernbert": "ModernBertForSequenceClassification",
        "modernbert-decoder": "ModernBertDecoderForSequenceClassification",
    },
    "token-classification": {"modernbert": "ModernBertForTokenClassification"},
    "multiple-choice": {"modernbert": "ModernBertForMultipleChoice"},
    "question-answering": {"modernbert": "ModernBertForQuestionAnswering"},
}
_CLASSES = {str(n): (kind, of) for kind, names in _MODELS.items() if kind != "pretraining" for of, n in names.items()}
# Heads that were trained for one task; a base or language model may get a fresh head for any.
TRAINED_HEADS = ("sequence-classification", "token-classification", "multiple-choice", "question-answering")


def architectures_of(values: Mapping[str, Any]) -> list[str]:
    """The classes that the content of a `config.json` names."""
    given = values.get("architectures")
    return [name for name in (given if isinstance(given, list) else [given]) if isinstance(name, str)]


def _known_class(values: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Kind and `model_type` of the first class that the content of a `config.json` names and that is known here."""
    return next((_CLASSES[name] for name in architectures_of(values) if name in _CLASSES), (None, None))


def kind_of(values: Mapping[str, Any]) -> str | None:
    """The kind of model that the content of a `config.json` names under `architectures`, such as "masked-lm"."""
    return _known_class(values)[0]


# As PEFT names the tasks of adapters that bring a head.
_TASK_TYPES = {
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "causal-lm",
}


def kind_of_adapter(adapter: Any) -> str | None:
    """The kind of model that an adapter makes of its base; None where it does not say, or leaves the base's head.

    Args:
        adapter: as `from_pretrained` takes it; of several the first counts.
    """
    first = next(iter(adapter.values()), None) if isinstance(adapter, Mapping) else adapter
    if not isinstance(first, str | Path | Source):
        return None
    source = first if isinstance(first, Source) else Source(first)
    if source.find("config.json") is not None:
        return kind_of(source.read_json("config.json"))
    task = source.read_json(ADAPTER).get("task_type")
    return _TASK_TYPES.get(task) if isinstance(task, str) else None


class AutoConfig:
    """Reads the configuration class that `model_type` names."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Config:
        """Like `ModernBertConfig.from_pretrained`, for any known `model_type`.

        Raises:
            NotFoundError: there is no such folder, repository or file.
            ConfigError: `model_type` is unknown, or a value is impossible.
        """
        values, kwargs = Config.get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = values.get("model_type")
        if model_type is None:
            model_type = _known_class(values)[1]
        kind = cls._class_for(model_type, str(pretrained_model_name_or_path))
        return kind.from_dict(values, **{"name_or_path": str(pretrained_model_name_or_path), **kwargs})

    @classmethod
    def for_model(cls, model_type: str, **kwargs: Any) -> Config:
        """A new configuration of this type, with these fields.

        Raises:
            ConfigError: the type is unknown, or a value is impossible.
        """
        return cls._class_for(model_type, "for_model")(**kwargs)

    @classmethod
    def _class_for(cls, model_type: Any, origin: str) -> type[Config]:
        if not isinstance(model_type, str) or model_type not in _CONFIGS:
            raise ConfigError(f"{origin} has model_type {shown(model_type)}; known are {', '.join(_CONFIGS)}")
        kind: type[Config] = _found(_CONFIGS[model_type])
        return kind

    @classmethod
    def register(cls, model_type: str, config: type[Config], exist_ok: bool = False) -> None:
        """Read this class of configuration where a file's `model_type` is this.

        Raises:
            InputError: it is another type's, or the type is known already, without `exist_ok`.
        """
        if config.model_type != model_type:
            raise InputError(f"model_type is {shown(model_type)}; that of {config.__name__} is {config.model_type!r}")
        if model_type in _CONFIGS and not exist_ok:
            raise InputError(f"model_type {model_type!r} is known already; exist_ok=True replaces it")
        _CONFIGS[model_type] = config


class AutoTokenizer:
    """Reads the tokenizer of any checkpoint."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Tokenizer:
        """Like `Tokenizer.from_pretrained`; a `config` is not needed."""
        kwargs.pop("config", None)
        return Tokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)


class _AutoModelBase:
    kind: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} makes models of other classes: {name}.from_pretrained(...) or {name}.from_config(...)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *,
        config: Config | str | Path | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Load a model of this kind; for arguments see `PreTrainedModel.from_pretrained`.

        Raises:
            NotFoundError: there is no such folder, repository or file.
            ConfigError: the checkpoint's `model_type` is unknown, or has no model of this kind.
        """
        if not isinstance(config, Config):
            where = config or pretrained_model_name_or_path
            if where is None:
                raise InputError("pretrained_model_name_or_path is None; give a name or folder, or config, state_dict")
            config = AutoConfig.from_pretrained(where, **_where(kwargs))
        kind = cls._class_for(config)
        model: PreTrainedModel = kind.from_pretrained(pretrained_model_name_or_path, config=config, **kwargs)
        return model

    @classmethod
    def from_config(cls, config: Config, **kwargs: Any) -> PreTrainedModel:
        """Make a freshly initialised model of this kind; for arguments see `PreTrainedModel.from_config`."""
        model: PreTrainedModel = cls._class_for(config).from_config(config, **kwargs)
        return model

    @classmethod
    def _class_for(cls, config: Config) -> Any:
        models = _MODELS[cls.kind]
        if config.model_type not in models:
            raise ConfigError(
                f"{cls.__name__} has no model for model_type {config.model_type!r}; known are {', '.join(models)}"
            )
        return _found(models[config.model_type])

    @classmethod
    def register(cls, config_class: type[Config], model_class: type[PreTrainedModel], exist_ok: bool = False) -> None:
        """Load this class of model for configurations of this class, which `AutoConfig.register` makes known.

        Raises:
            InputError: there is a model of this kind for them already, without `exist_ok`.
        """
        known = _MODELS[cls.kind]
        if config_class.model_type in known and not exist_ok:
            raise InputError(f"{cls.__name__} has {config_class.model_type!r} already; exist_ok=True replaces it")
        known[config_class.model_type] = model_class
        _CLASSES[model_class.__name__] = cls.kind, config_class.model_type


def _found(what: str | type[Any]) -> Any:
    """A class that was registered, or one of this package by its name."""
    return getattr(modernbert, what) if isinstance(what, str) else what


def load_as_saved(name_or_folder: str | Path, **kwargs: Any) -> Any:
    """Load a checkpoint as the class that its `config.json` names; one that names none as a bare model.

    A folder of sentence-transformers' encoders becomes a `SentenceEncoder`; one of its cross-encoders keeps its head.
    For arguments and errors see `PreTrainedModel.from_pretrained`.
    """
    name_or_folder, kwargs = with_base(name_or_folder, kwargs)
    source = Source.pop_from(name_or_folder, dict(kwargs))
    contents = contents_of(source)
    contents.refuse_unserved()
    if contents.kind not in (MODEL, CROSS_ENCODER):
        return SentenceEncoder.from_pretrained(name_or_folder, **kwargs)
    kwargs["subfolder"] = source.inside(contents.inner).subfolder
    config = AutoConfig.from_pretrained(name_or_folder, **_where(kwargs))
    models = _MODELS[kind_of_adapter(kwargs.get("adapter")) or kind_of(config.extra) or "base"]
    if config.model_type not in models:
        head = shown(config.extra.get("architectures"))
        raise ConfigError(f"{name_or_folder} has model_type {config.model_type!r}, which has no {head}")
    return _found(models[config.model_type]).from_pretrained(name_or_folder, **kwargs)


def _where(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of these arguments, those that say where a checkpoint is."""
    names = ("revision", "subfolder", "cache_dir", "token", "use_auth_token", "local_files_only", "force_download")
    return {name: kwargs[name] for name in names if name in kwargs}


class AutoModel(_AutoModelBase):
    """The bare model, without a head."""

    kind = "base"


class AutoModelForPreTraining(_AutoModelBase):
    """The language model of the checkpoint's kind, as it is pretrained."""

    kind = "pretraining"


class AutoModelForMaskedLM(_AutoModelBase):
    """Masked language models."""

    kind = "masked-lm"


class AutoModelForCausalLM(_AutoModelBase):
    """Language models that say what comes next."""

    kind = "causal-lm"


class AutoModelForSequenceClassification(_AutoModelBase):
    """Classifiers of whole texts, and cross-encoders."""

    kind = "sequence-classification"


class AutoModelForTokenClassification(_AutoModelBase):
    """Classifiers of tokens."""

    kind = "token-classification"


class AutoModelForMultipleChoice(_AutoModelBase):
    """Models that choose one of several continuations."""

    kind = "multiple-choice"


class AutoModelForQuestionAnswering(_AutoModelBase):
    """Models that find an answer in a text."""

    kind = "question-answering"
