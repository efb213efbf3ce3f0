"""`GenerationConfig`: defaults of generation with attributes, as `generation_config.json` holds them."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from modernbert.checks import described
from modernbert.decoding.options import NO_EFFECT, REFUSED, GenerateOptions
from modernbert.errors import InputError, listed
from modernbert.io.files import write_text
from modernbert.io.hub import Source

logger = logging.getLogger(__name__)

FILE = "generation_config.json"
_OPTIONS = tuple(field.name for field in dataclasses.fields(GenerateOptions))
_SILENT = ("_from_model_config", "bos_token_id", "cache_implementation", "transformers_version")
_KNOWN = tuple(dict.fromkeys((*_OPTIONS, *_SILENT, *NO_EFFECT, *REFUSED)))


class GenerationConfig:
    """Defaults of `generate`, each an attribute; None is not given, and then the model's own or the usual value holds.

    Values are checked by the constructor and by `generate`, which says what each means.

    Args:
        values: options of `generate`. Other names are kept and saved, and change nothing.

    Raises:
        InputError: an option is impossible.
    """

    def __init__(self, **values: Any) -> None:
        vars(self).update(_ids_of=None, **{name: value for name, value in values.items() if value is not None})
        self.validate()

    def __getattr__(self, name: str) -> Any:
        if name not in _KNOWN:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(vars(self).get("_ids_of"), name, None) if name.endswith("token_id") else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GenerationConfig) and self.to_diff_dict() == other.to_diff_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def validate(self, **kwargs: Any) -> None:
        """Raise `InputError` where options are impossible or contradict each other."""
        GenerateOptions.make({name: vars(self)[name] for name in _OPTIONS if name in vars(self)}, {})

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set what there are attributes for; what there are none for is returned."""
        unused = {name: value for name, value in kwargs.items() if not hasattr(self, name)}
        for name in kwargs.keys() - unused.keys():
            setattr(self, name, kwargs[name])
        return unused

    def to_dict(self) -> dict[str, Any]:
        """All options, None where they are not given."""
        return copy.deepcopy({name: getattr(self, name) for name in _KNOWN} | self.to_diff_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        """What is given."""
        return {name: value for name, value in vars(self).items() if name != "_ids_of" and value is not None}

    def to_json_string(self, use_diff: bool = True, ignore_metadata: bool = False) -> str:
        """What is given, or with `use_diff=False` all options, as JSON."""
        content = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(content, indent=2, sort_keys=True, default=_as_plain) + "\n"

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = True) -> None:
        """Write `to_json_string`."""
        write_text(Path(json_file_path), self.to_json_string(use_diff))

    def save_pretrained(self, save_directory: str | Path, config_file_name: str | None = None, **kwargs: Any) -> None:
        """Write `generation_config.json` into a folder.

        Raises:
            InputError: `push_to_hub` is given, or something else that is not served.
        """
        if given := [name for name, value in kwargs.items() if value]:
            raise InputError(f"{listed(given)} is no argument here; save the model with model.save_pretrained")
        self.to_json_file(Path(save_directory) / (config_file_name or FILE))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | Path,
        config_file_name: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        subfolder: str = "",
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Read `generation_config.json` of a folder or of the Hub.

        Args:
            pretrained_model_name: a folder or a repository id.
            config_file_name: another file's name.
            cache_dir, local_files_only, token, revision, subfolder: see `modernbert.io.hub.Source`.
            return_unused_kwargs: return the keyword arguments that are no options as well.
            kwargs: options that replace the file's.

        Raises:
            NotFoundError: there is no such file.
        """
        source = Source(pretrained_model_name, revision, subfolder or "", cache_dir, token, local_files_only)
        found = cls.from_dict(source.read_json(config_file_name or FILE))
        unused = found.update(**kwargs)
        return (found, unused) if return_unused_kwargs else found

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Defaults of a file's content, which `generate` checks."""
        made = cls()
        vars(made).update(copy.deepcopy(dict(config_dict)))
        unused = made.update(**kwargs)
        return (made, unused) if return_unused_kwargs else made

    @classmethod
    def from_model_config(cls, model_config: Any) -> Self:
        """The ids of a model's configuration."""
        ids = {name: getattr(model_config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return cls(**ids, _from_model_config=True)

    @classmethod
    def of(cls, given: Any, model_config: Any = None) -> GenerationConfig:
        """One of ours, of a mapping or of another library's object; ids that are not given are the model's.

        Raises:
            InputError: it is none of these.
        """
        if not isinstance(given, cls):
            content = given.to_dict() if hasattr(given, "to_dict") else {} if given is None else given
            if not isinstance(content, Mapping):
                raise InputError(f"generation_config is {described(given)}; give a GenerationConfig")
            given = cls.from_dict({name: value for name, value in content.items() if value is not None})
        vars(given)["_ids_of"] = model_config
        return given

    @property
    def not_served(self) -> list[str]:
        """Names of a file's options that generation here does not know."""
        known = {*_OPTIONS, *_SILENT}
        return sorted(name for name in self.to_diff_dict() if name not in known)


def _as_plain(value: Any) -> Any:
    """Tensors and sets for JSON."""
    return value.tolist() if hasattr(value, "tolist") else list(value)
