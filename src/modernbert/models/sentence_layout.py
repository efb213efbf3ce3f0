"""What a checkpoint's folder holds, and the layout of sentence-transformers, but for its weights.

`modules.json` lists the parts of a model, each in a folder of its own; a few more files have prompts and limits. The
spellings of all releases are read. A folder without it holds one model, with or without a head; `contents_of` decides
which it is, for everything that loads or describes a checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from modernbert.errors import CheckpointError, ConfigError, listed, shown
from modernbert.io.hub import Source, check_name
from modernbert.nn.pooling import POOLINGS
from modernbert.text.tokenizer import Tokenizer

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
TRANSFORMER_SETTINGS = "sentence_bert_config.json"
ROUTES = "router_config.json"
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
# What a folder may hold.
MODEL, SENTENCE_ENCODER, CROSS_ENCODER = "model", "sentence encoder", "cross-encoder"
LATE_INTERACTION, SPARSE_ENCODER = "late-interaction encoder", "sparse encoder"
SERVED_BY = {
    LATE_INTERACTION: ("MultiVectorEncoder", "late-interaction"),
    SPARSE_ENCODER: ("SparseEncoder", "sparse-embedding"),
}
STANFORD = "HF_ColBERT"  # the architecture that Stanford's folders of late interaction name
_MODEL_TYPES = {  # as a folder's settings spell them
    "SentenceTransformer": SENTENCE_ENCODER,
    "CrossEncoder": CROSS_ENCODER,
    "MultiVectorEncoder": LATE_INTERACTION,
    "ColBERT": LATE_INTERACTION,
    "SparseEncoder": SPARSE_ENCODER,
}
# Settings of late interaction that change the vectors, as PyLate and sentence-transformers write them.
_OF_LATE_INTERACTION = (
    "query_prefix",
    "document_prefix",
    "query_length",
    "document_length",
    "query_expansion",
    "do_query_expansion",
    "attend_to_expansion_tokens",
    "skiplist_words",
)
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
        poolings: modes of `nn.pooling`; several are put one after another. Empty if a text keeps a vector for every
            token.
        include_prompt: whether the prompt's tokens are pooled too.
        prompts: texts to put before a text, by name.
        default_prompt_name: the one to take if none is named.
        similarity: "cosine", "dot", "euclidean" or "manhattan": how the vectors want to be compared.
        max_length: tokens that a text is cut to; None if the folder does not say.
        truncate_dim: how many of a vector's first dimensions are kept; None keeps all.
    """

    similarities: ClassVar[tuple[str, ...]] = SIMILARITIES

    poolings: tuple[str, ...] = ("mean",)
    include_prompt: bool = True
    prompts: dict[str, str] = dataclasses.field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity: str = "cosine"
    max_length: int | None = None
    truncate_dim: int | None = None

    def __post_init__(self) -> None:
        for mode in self.poolings:
            if mode not in POOLINGS:
                raise ConfigError(f"poolings holds {mode!r}; choose among {', '.join(POOLINGS)}")
        if self.similarity not in self.similarities:
            raise ConfigError(f"similarity is {shown(self.similarity)}; choose one of {', '.join(self.similarities)}")
        if self.default_prompt_name is not None and self.default_prompt_name not in list(self.prompts):
            raise ConfigError(
                f"default_prompt_name is {shown(self.default_prompt_name)}; there are {listed(self.prompts) or 'none'}"
            )


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a checkpoint's folder or repository holds.

    Attributes:
        name: what it is called in messages.
        kind: "model" (one model, with or without a head), "sentence encoder", "cross-encoder", "late-interaction
            encoder" or "sparse encoder".
        parts: what `modules.json` lists; empty if there is none.
        inner: the folder inside of it that holds the model's configuration and weights; "" is the folder itself.
        about: content of `config_sentence_transformers.json`; empty if there is none.
        unserved: settings or parts that nothing here acts on, by name.
        queries: the parts that read queries, where they are others than `parts`.
    """

    name: str
    kind: str
    parts: list[dict[str, Any]]
    inner: str
    about: dict[str, Any]
    unserved: list[str]
    queries: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def refuse_unserved(self) -> None:
        """Raise `CheckpointError` if the folder holds what needs a class of its own, or nothing here acts on."""
        if self.kind in SERVED_BY:
            model, task = SERVED_BY[self.kind]
            raise CheckpointError(f"{self.name} is a {self.kind}; load it by {model}, or use pipeline({task!r}, ...)")
        if self.queries:
            raise CheckpointError(f"{self.name} reads queries and documents by different parts, which is not served")
        if self.unserved:
            raise CheckpointError(
                f"{self.name} is a {self.kind}, with {listed(self.unserved)}, which is not served; its model alone "
                "loads by AutoModel"
            )

    def refuse_cross_encoder(self) -> None:
        """Raise `CheckpointError` if the folder scores pairs of texts and has no vectors."""
        if self.kind == CROSS_ENCODER:
            raise CheckpointError(
                f"{self.name} is a cross-encoder, which scores pairs of texts and has no vectors of single ones; use "
                "pipeline('text-ranking', ...)"
            )


def contents_of(source: Source) -> Contents:
    """What a folder or repository holds, by its settings alone: no weights are read.

    Raises:
        NotFoundError: the source itself cannot be found or reached.
        CheckpointError: its files are malformed, or it holds an adapter.
    """
    parts, queries = _routed(source, read_parts(source))
    inner = str(parts[0]["path"]) if parts else ""
    body = source.inside(inner)
    about, limits, config = (
        place.read_json(name) if place.find(name) is not None else {}
        for place, name in ((source, SETTINGS), (body, TRANSFORMER_SETTINGS), (body, "config.json"))
    )
    name = str(source.folder or source.name_or_folder)
    if not about and not parts and not config:
        source.refuse_adapter()
    declared = about.get("model_type")
    kind = _MODEL_TYPES.get(declared) if isinstance(declared, str) else None
    late = [key for key in _OF_LATE_INTERACTION if key in about or key in limits]
    if about.get("similarity_fn_name") in ("MaxSim", "maxsim"):
        late.append("similarity_fn_name")
    if kind in (None, SENTENCE_ENCODER) and (late or config.get("architectures") == [STANFORD]):
        kind = LATE_INTERACTION
    elif kind is None and (
        limits.get("transformer_task") == "sequence-classification"
        or "sentence_transformers" in config
        or "sbert_ce_default_activation_function" in config
    ):
        kind = CROSS_ENCODER
    elif kind is None and any(kind_of_part(part) == "SpladePooling" for part in parts):
        kind = SPARSE_ENCODER
    elif kind is None:
        kind = SENTENCE_ENCODER if parts else MODEL
    unserved: list[str] = []
    if kind == CROSS_ENCODER:  # one model that gives the scores; other parts make scores of something else
        unserved = [kind_of_part(part) for part in parts[1:]]
    return Contents(name, kind, parts, inner, about, unserved, queries)


def load_tokenizer(name_or_folder: str | Path, **places: Any) -> Tokenizer:
    """The tokenizer of a folder or repository; a layout may keep it in the folder of its first part.

    Args:
        name_or_folder: what holds it.
        places: where to look; see `modernbert.io.hub.Source`.

    Raises:
        NotFoundError: there is none.
    """
    source = Source.pop_from(name_or_folder, dict(places))
    if source.find("tokenizer.json") is None:
        parts, _ = _routed(source, read_parts(source))
        if parts and parts[0]["path"]:
            return Tokenizer.from_pretrained(**source.inside(parts[0]["path"]).arguments)
    return Tokenizer.from_pretrained(name_or_folder, **places)


def _routed(source: Source, parts: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The parts that read documents, and those that read queries where a router sends these another way."""
    if not parts or kind_of_part(parts[0]) != "Router":
        return parts, []
    there = source.inside(parts[0]["path"])
    path, routes = there.need(ROUTES), there.read_json(ROUTES)
    types, structure = routes.get("types"), routes.get("structure")
    if not isinstance(types, dict) or not isinstance(structure, dict) or len(parts) > 1:
        raise CheckpointError(f"{path} has no routes with their parts, or other parts follow the router")
    found = []
    for route in ("document", "query"):
        names = structure.get(route)
        if not isinstance(names, list) or not names or not all(isinstance(types.get(name), str) for name in names):
            raise CheckpointError(f"{path} has no route {route!r} of parts with a type; it has {listed(structure)}")
        found.append([{"type": types[name], "path": _joined(parts[0]["path"], name, path)} for name in names])
    return found[0], found[1]


def _joined(folder: str, name: str, path: Any) -> str:
    check_name(name, "folder", path)
    return f"{folder}/{name}" if folder else name


def kind_of_part(part: dict[str, Any]) -> str:
    """What a part of a layout is, such as "Pooling": the last word of its type."""
    return str(part["type"]).rpartition(".")[2]


def read_parts(source: Source) -> list[dict[str, Any]]:
    """What `modules.json` lists, in order; nothing if the folder is no layout.

    Raises:
        CheckpointError: it is no list of parts.
    """
    path = source.find(MODULES)
    if path is None:
        return []
    parts = source.read_any_json(MODULES)
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and isinstance(part.get("type"), str) and isinstance(part.get("path"), str)
        for part in parts
    ):
        raise CheckpointError(f"{path} is no list of parts with a type and a path")
    for part in parts:
        check_name(part["path"], "folder", path)
    return parts


def pooling_of(config: dict[str, Any]) -> dict[str, Any]:
    """Poolings of a part's configuration, in today's spelling or the older one."""
    given = config.get("pooling_mode")
    if given is None:
        given = [mode for key, mode in _OLDER_KEYS.items() if config.get(key)] or ["mean"]
    modes = given if isinstance(given, list) else [given]
    unknown = [mode for mode in modes if not isinstance(mode, str) or mode not in _POOLINGS]
    if unknown or not modes:
        raise CheckpointError(f"a folder pools by {shown(given)}; known are {', '.join(_POOLINGS)}")
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


def settings_of(source: Source, inner: str, similarities: Sequence[str] = SIMILARITIES) -> dict[str, Any]:
    """Prompts, similarity and longest text of a folder, whose similarity is one of these."""
    values: dict[str, Any] = {}
    if source.find(SETTINGS) is not None:
        about = source.read_json(SETTINGS)
        prompts = about.get("prompts") or {}
        if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
            raise CheckpointError(f"{SETTINGS} has prompts {shown(prompts)}; they must be texts by name")
        values["prompts"] = {name: text or "" for name, text in prompts.items()}
        values["default_prompt_name"] = about.get("default_prompt_name")
        similarity = about.get("similarity_fn_name")
        if similarity is not None and similarity not in similarities:
            known = ", ".join(similarities)
            raise CheckpointError(f"{SETTINGS} has similarity_fn_name {shown(similarity)}; known are {known}")
        values["similarity"] = similarity or similarities[0]
        values["truncate_dim"] = _count(SETTINGS, "truncate_dim", about.get("truncate_dim"))
    there = source.inside(inner)
    if there.find(TRANSFORMER_SETTINGS) is not None:
        limits = there.read_json(TRANSFORMER_SETTINGS)
        if limits.get("do_lower_case"):
            raise CheckpointError("the folder has do_lower_case, which the tokenizer of this architecture has not")
        values["max_length"] = _count(TRANSFORMER_SETTINGS, "max_seq_length", limits.get("max_seq_length"))
    return values


def _count(file: str, name: str, value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise CheckpointError(f"{file} has {name} {shown(value)}; it must be a whole number of at least 1")
    return value
