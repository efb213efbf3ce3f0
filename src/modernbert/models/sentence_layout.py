"""The folder layout of sentence-transformers, but for its weights: which parts there are, and what they say.

`modules.json` lists the parts of a model, each in a folder of its own; a few more files have prompts and limits. The
spellings of all releases are read.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import PurePosixPath
from typing import Any

from modernbert.errors import CheckpointError, ConfigError
from modernbert.hub import Source
from modernbert.ops.pooling import POOLINGS

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
TRANSFORMER_SETTINGS = "sentence_bert_config.json"
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
# The layout's names of poolings; older folders have one key for each, in this order where there are several.
_POOLINGS = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
_OLDER_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclasses.dataclass(frozen=True)
class EmbeddingSettings:
    """What a folder says about vectors besides weights.

    Attributes:
        poolings: modes of `ops.pooling`; several are put one after another. None where a text keeps a vector for every
            token.
        include_prompt: whether the prompt's tokens are pooled too.
        prompts: texts to put before a text, by name.
        default_prompt_name: the one to take where nobody names one.
        similarity: "cosine", "dot", "euclidean" or "manhattan": how the vectors want to be compared.
        max_length: tokens that a text is cut to; None where the folder does not say.
    """

    poolings: tuple[str, ...] = ("mean",)
    include_prompt: bool = True
    prompts: dict[str, str] = dataclasses.field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity: str = "cosine"
    max_length: int | None = None

    def __post_init__(self) -> None:
        for mode in self.poolings:
            if mode not in POOLINGS:
                raise ConfigError(f"poolings holds {mode!r}; choose among {', '.join(POOLINGS)}")
        if self.similarity not in SIMILARITIES:
            raise ConfigError(f"similarity is {self.similarity!r}; choose one of {', '.join(SIMILARITIES)}")
        if self.default_prompt_name is not None and self.default_prompt_name not in self.prompts:
            raise ConfigError(
                f"default_prompt_name is {self.default_prompt_name!r}; there are {', '.join(self.prompts) or 'none'}"
            )


def read_parts(source: Source) -> list[dict[str, Any]]:
    """What `modules.json` lists, in order; nothing where the folder is no layout.

    Raises:
        CheckpointError: it is no list of parts.
    """
    path = source.find(MODULES)
    if path is None:
        return []
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and {"type", "path"} <= set(part) for part in parts
    ):
        raise CheckpointError(f"{path} is no list of parts with a type and a path")
    for part in parts:
        inner = PurePosixPath(str(part["path"]))
        if ".." in inner.parts or inner.is_absolute() or "\\" in str(inner):
            raise CheckpointError(f"{path} names the folder {str(inner)!r}, which lies outside of it")
    return parts


def encoder_folder(source: Source) -> str:
    """The folder of a layout's encoder inside of it; "" where it is the layout's own, or there is no layout."""
    parts = read_parts(source)
    return str(parts[0]["path"]) if parts else ""


def pooling_of(config: dict[str, Any]) -> dict[str, Any]:
    """Poolings of a part's configuration, in today's spelling or the older one."""
    given = config.get("pooling_mode")
    if given is None:
        given = [mode for key, mode in _OLDER_KEYS.items() if config.get(key)] or ["mean"]
    modes = [given] if isinstance(given, str) else list(given)
    unknown = [mode for mode in modes if mode not in _POOLINGS]
    if unknown:
        raise CheckpointError(f"a folder pools by {unknown}; known are {', '.join(_POOLINGS)}")
    return {
        "poolings": tuple(_POOLINGS[mode] for mode in modes),
        "include_prompt": bool(config.get("include_prompt", True)),
    }


def pooling_keys(settings: EmbeddingSettings) -> dict[str, Any]:
    """A pooling part's configuration, in the older spelling wherever that can say it, which all readers take."""
    names = {ours: theirs for theirs, ours in _POOLINGS.items()}
    chosen = [names[mode] for mode in settings.poolings]
    older = {key: mode in chosen for key, mode in _OLDER_KEYS.items()}
    in_order = chosen == [mode for mode in _OLDER_KEYS.values() if mode in chosen]
    return {**(older if in_order else {"pooling_mode": chosen}), "include_prompt": settings.include_prompt}


def settings_of(source: Source, inner: str) -> dict[str, Any]:
    """Prompts, similarity and longest text of a folder."""
    values: dict[str, Any] = {}
    if source.find(SETTINGS) is not None:
        about = source.read_json(SETTINGS)
        prompts = about.get("prompts") or {}
        if not isinstance(prompts, dict):
            raise CheckpointError(f"{SETTINGS} has prompts {prompts!r}; they must be texts by name")
        values["prompts"] = {str(k): str(v) for k, v in prompts.items()}
        values["default_prompt_name"] = about.get("default_prompt_name")
        if about.get("similarity_fn_name") in SIMILARITIES:
            values["similarity"] = about["similarity_fn_name"]
    there = source.inside(inner)
    if there.find(TRANSFORMER_SETTINGS) is not None:
        limits = there.read_json(TRANSFORMER_SETTINGS)
        if limits.get("do_lower_case"):
            raise CheckpointError("the folder has do_lower_case, which the tokenizer of this architecture has not")
        longest = limits.get("max_seq_length")
        if longest is not None and (not isinstance(longest, int) or longest < 1):
            raise CheckpointError(f"{TRANSFORMER_SETTINGS} has max_seq_length {longest!r}; it must be a whole number")
        values["max_length"] = longest
    return values
