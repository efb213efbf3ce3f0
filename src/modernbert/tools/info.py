"""What a checkpoint is, read from its files without loading its weights."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from modernbert.auto import AutoConfig, architectures_of, kind_of
from modernbert.config import Config
from modernbert.engines.cpu.library import library
from modernbert.errors import CheckpointError, listed
from modernbert.io.checkpoint import weight_files, weight_names
from modernbert.io.hub import Source
from modernbert.models.adapters import AdapterFolder, with_base
from modernbert.models.sentence_layout import MODEL, MODULES, contents_of, kind_of_part
from modernbert.quantization.options import Record
from modernbert.text.tokenizer import Tokenizer

_BYTES = {"F64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}
_HELPERS = (".weight_scale", ".outliers", ".outlier_weight")  # of quantized weights, whose numbers they are not


def checkpoint_info(name_or_folder: str, lengths: list[int], revision: str | None = None) -> dict[str, Any]:
    """Describe a checkpoint: sizes, layers, windows, labels, files, memory.

    Args:
        name_or_folder: a folder or a repository on the Hub.
        lengths: tokens of forward passes for which to estimate the memory.
        revision: branch, tag or commit.

    Returns:
        Nested dicts of plain values; sizes and memory in bytes.

    Raises:
        NotFoundError, CheckpointError, ConfigError: it cannot be read.
    """
    source = Source(name_or_folder, revision)
    about = {} if source.find(MODULES) is not None else with_base(name_or_folder, {"revision": revision})[1]
    contents = contents_of(source.holding("config.json") if "adapter" in about else source)
    body = source.inside(contents.inner)
    config = AutoConfig.from_pretrained(name_or_folder, revision=revision, subfolder=body.subfolder)
    base = body.base_of_adapter()
    adapter, body = (None, body) if base is None else (AdapterFolder(body), base)
    files = weight_files(body)
    stored, item = 0, 0
    counts: dict[str, int] = {}
    dtypes: Counter[str] = Counter()
    for name, (_, shape, dtype) in weight_names(files).items():
        size = _BYTES.get(dtype, 4)
        stored += math.prod(shape) * size
        if not name.endswith(_HELPERS):
            item = max(item, size)
            counts[name] = math.prod(shape) * (2 if dtype == "U8" else 1)  # a byte holds two numbers of 4 bits
            dtypes["4 bits" if dtype == "U8" else dtype] += counts[name]
    item = item or 4
    out: dict[str, Any] = {
        "model": {
            "name": str(name_or_folder),
            "class": listed(architectures_of(config.extra)) or "not given",
            "kind": kind_of(config.extra) or "base" if contents.kind == MODEL else contents.kind,
            "parameters": sum(counts.values()),
            "of them embedding": sum(n for name, n in counts.items() if name.endswith("tok_embeddings.weight")),
            "dtype": ", ".join(f"{dtype} {n:,}" if len(dtypes) > 1 else dtype for dtype, n in dtypes.most_common()),
        },
        "architecture": _architecture(config),
    }
    if (record := Record.of(config)) is not None:
        out["quantization"] = record.to_dict()
    if any(name.startswith("classifier.") for name in counts):
        out["labels"] = {str(i): label for i, label in (config.id2label or {}).items()}
        out["architecture"]["pooling"] = getattr(config, "classifier_pooling", "last token")
        out["architecture"]["problem"] = config.problem_type or "by the labels"
    if adapter is not None:
        out["adapter"] = {"of": str(body.name_or_folder), **adapter.summary()}
    if contents.parts:
        out["parts"] = [kind_of_part(part) for part in contents.parts]
    if contents.unserved:
        out["not served"] = contents.unserved
    try:
        tokenizer = Tokenizer.from_pretrained(name_or_folder, revision=revision)
        out["tokenizer"] = {"ids": len(tokenizer), "special": tokenizer.special_tokens_map}
    except CheckpointError:
        out["tokenizer"] = {"ids": "no tokenizer.json"}
    folder = source.folder
    every = sorted(p for p in folder.rglob("*") if p.is_file()) if folder is not None else files
    out["files"] = {str(p.relative_to(folder)) if folder else p.name: p.stat().st_size for p in every}
    out["memory"] = {str(n): stored + activation_bytes(config, n, item) for n in lengths}
    if config.reach("full_attention").right == 0:
        out["cache"] = {str(n): cache_bytes(config, n, item) for n in lengths}
    return out


def _architecture(config: Config) -> dict[str, Any]:
    left, right = config.reach("sliding_attention")
    return {
        "layers": config.num_hidden_layers,
        "global layers": [i for i, kind in enumerate(config.layer_types or ()) if kind == "full_attention"],
        "local window": f"{left} tokens to either side" if left == right else f"the token itself and {left} before it",
        "hidden size": config.hidden_size,
        "intermediate size": config.intermediate_size,
        "heads": f"{config.num_attention_heads} of {config.head_dim}",
        "context": config.max_position_embeddings,
        "rope theta": {kind: values["rope_theta"] for kind, values in (config.rope_parameters or {}).items()},
        "vocabulary": config.vocab_size,
    }


def cache_bytes(config: Config, tokens: int, item: int) -> int:
    """Bytes of the keys and values of one text of so many tokens while generating; `item` are those of a number."""
    reaches = [config.reach(kind).left for kind in config.layer_types or ()]
    held = sum(tokens if left is None else min(tokens, left + 1) for left in reaches)
    return 2 * held * config.hidden_size * item


def activation_bytes(config: Config, tokens: int, item: int) -> int:
    """Bytes that an encoder needs for the states of so many tokens at once, when serving on a CPU.

    Our own kernels keep the residual stream, one buffer for queries, keys and values or the MLP's states, and rotary
    tables. PyTorch alone needs most within one MLP (the stream, both halves of the first projection, three tensors of
    the intermediate size) or one attention (about sixteen tensors like the stream, as measured).

    Args:
        config: the architecture.
        tokens: of all texts of a forward pass.
        item: bytes of a number.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    if library() is not None:
        return int(tokens * (4 * (hidden + 6 * config.head_dim) + item * max(3 * hidden, inner)))
    return int(tokens * item * max(hidden + 5 * inner, 16 * hidden))
