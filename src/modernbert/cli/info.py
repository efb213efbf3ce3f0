"""`modernbert info`: what a checkpoint is, read from its files without loading its weights."""

from __future__ import annotations

import math
from collections import Counter
from typing import Annotated, Any

import typer

from modernbert.errors import CheckpointError, InputError, listed, printable

_BYTES = {"F64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}
_HELPERS = (".weight_scale", ".outliers", ".outlier_weight")  # of quantized weights, whose numbers they are not


def info(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository.")],
    lengths: Annotated[str, typer.Option(help="Numbers of tokens to give the memory for.")] = "128,512,2048,8192",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what a checkpoint is: sizes, layers, windows, labels, files, memory at given lengths.

    Example: modernbert info answerdotai/ModernBERT-base
    """
    from modernbert.io.tables.writing import to_json

    try:
        tokens = [int(n) for n in lengths.split(",")]
    except ValueError:
        raise InputError(f"--lengths is {lengths!r}; give whole numbers with commas between") from None
    if not tokens or min(tokens) < 1:
        raise InputError(f"--lengths is {lengths!r}; give numbers of at least 1")
    found = describe(model, tokens, revision)
    if as_json:
        typer.echo(to_json(found, str))
    else:
        _show(found)


def describe(name_or_folder: str, lengths: list[int], revision: str | None = None) -> dict[str, Any]:
    """What a checkpoint is, as nested dicts of plain values.

    Args:
        name_or_folder: a folder or a repository on the Hub.
        lengths: tokens of a forward pass, for which to estimate the memory.
        revision: branch, tag or commit.

    Raises:
        NotFoundError, CheckpointError, ConfigError: it cannot be read.
    """
    from modernbert.auto import AutoConfig, architectures_of, kind_of
    from modernbert.io.checkpoint import weight_files, weight_names
    from modernbert.io.hub import Source
    from modernbert.models.sentence_layout import MODEL, contents_of, kind_of_part
    from modernbert.quantization.options import Record
    from modernbert.text.tokenizer import Tokenizer

    source = Source(name_or_folder, revision)
    contents = contents_of(source)
    body = source.inside(contents.inner)
    config = AutoConfig.from_pretrained(name_or_folder, revision=revision, subfolder=body.subfolder)
    files = weight_files(body)
    names = weight_names(files)
    halves = {name: 2 if dtype == "U8" else 1 for name, (_, _, dtype) in names.items()}
    stored = sum(math.prod(shape) * _BYTES.get(dtype, 4) for _, shape, dtype in names.values())
    names = {name: of for name, of in names.items() if not name.endswith(_HELPERS)}
    counts = {name: math.prod(shape) * halves[name] for name, (_, shape, _) in names.items()}
    dtypes = Counter({_said(dtype): 0 for _, _, dtype in names.values()})
    for name, (_, _, dtype) in names.items():
        dtypes[_said(dtype)] += counts[name]
    embedding = sum(n for name, n in counts.items() if name.endswith("tok_embeddings.weight"))
    item = max((_BYTES.get(dtype, 4) for _, _, dtype in names.values()), default=4)
    kinds = config.layer_types or []
    rope = config.rope_parameters or {}
    out: dict[str, Any] = {
        "model": {
            "name": str(name_or_folder),
            "class": listed(architectures_of(config.extra)) or "not said",
            "kind": kind_of(config.extra) or "base" if contents.kind == MODEL else contents.kind,
            "parameters": sum(counts.values()),
            "of them embedding": embedding,
            "dtype": ", ".join(f"{dtype} {n:,}" if len(dtypes) > 1 else dtype for dtype, n in dtypes.most_common()),
        },
        "architecture": {
            "layers": config.num_hidden_layers,
            "global layers": [i for i, kind in enumerate(kinds) if kind == "full_attention"],
            "local window": _window(config),
            "hidden size": config.hidden_size,
            "intermediate size": config.intermediate_size,
            "heads": f"{config.num_attention_heads} of {config.head_dim}",
            "context": config.max_position_embeddings,
            "rope theta": {kind: values["rope_theta"] for kind, values in rope.items()},
            "vocabulary": config.vocab_size,
        },
    }
    record = Record.of(config)
    if record is not None:
        out["quantization"] = record.to_dict()
    if any(name.startswith("classifier.") for name in counts):
        out["labels"] = {str(i): label for i, label in (config.id2label or {}).items()}
        out["architecture"]["pooling"] = getattr(config, "classifier_pooling", "last token")
        out["architecture"]["problem"] = config.problem_type or "by the labels"
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


def _said(dtype: str) -> str:
    return "4 bits" if dtype == "U8" else dtype


def _window(config: Any) -> str:
    left, right = config.reach("sliding_attention")
    return f"{left} tokens to either side" if left == right else f"the token itself and {left} before it"


def cache_bytes(config: Any, tokens: int, item: int) -> int:
    """Bytes of the keys and values of one text of so many tokens, when generating.

    Args:
        config: the architecture.
        tokens: of the text.
        item: bytes of a number.
    """
    held = [
        tokens if (left := config.reach(kind).left) is None else min(tokens, left + 1) for kind in config.layer_types
    ]
    return 2 * sum(held) * config.hidden_size * item


def activation_bytes(config: Any, tokens: int, item: int) -> int:
    """Bytes that an encoder needs for the states of so many tokens at once, when serving on a CPU.

    Our own kernels keep the residual stream, one buffer for queries, keys and values or the MLP's states, and rotary
    tables. PyTorch alone needs most within one MLP (the stream, both halves of the first projection, three tensors of
    the intermediate size) or one attention (about sixteen tensors like the stream, as measured).

    Args:
        config: the architecture.
        tokens: of all texts of a forward pass.
        item: bytes of a number.
    """
    from modernbert.engines.cpu.library import library

    hidden, inner = config.hidden_size, config.intermediate_size
    if library() is not None:
        return int(tokens * (4 * (hidden + 6 * config.head_dim) + item * max(3 * hidden, inner)))
    return int(tokens * item * max(hidden + 5 * inner, 16 * hidden))


def _show(found: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column()

    def add(name: str, value: Any) -> None:
        text = value if isinstance(value, str) else _plain(value)
        table.add_row(Text(printable(name)), Text(printable(text, keep="\n")))

    for section in ("model", "architecture", "tokenizer"):
        for name, value in found[section].items():
            add(f"tokenizer {name}" if section == "tokenizer" else name, value)
        table.add_section()
    if "quantization" in found:
        from modernbert.cli.quantize import described

        add("quantized", "\n".join([found["quantization"]["scheme"], *described(found["quantization"])]))
    if "labels" in found:
        labels = list(found["labels"].values())
        add("labels", f"{len(labels)}: {', '.join(labels[:12])}{', ...' if len(labels) > 12 else ''}")
    for name in ("parts", "not served"):
        if name in found:
            add(name, ", ".join(found[name]))
    for name, size in found["files"].items():
        add(name, f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes")
    table.add_section()
    for tokens, size in found["memory"].items():
        add(f"memory at {int(tokens):,} tokens", f"{size / 2**20:,.0f} MiB in the stored dtype, weights included")
    for tokens, size in found.get("cache", {}).items():
        add(f"cache of {int(tokens):,} tokens", f"{size / 2**20:,.1f} MiB")
    console.print(table)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,.10g}" if isinstance(value, int | float) else str(value)
