"""What a checkpoint's numbers are decided by: its weights, its tokenizer and its settings, as hashes of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from modernbert.io.hub import Source

_CONTENT = (
    *("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
)


def contents(source: Source) -> dict[str, str]:
    """The SHA-256 of each file that decides a model's answers, by its name; training's checkpoints are left out.

    Raises:
        NotFoundError, CheckpointError: the source holds no checkpoint, or cannot be reached.
    """
    folder, files = _files(source)
    return {path.relative_to(folder).as_posix(): digest(path) for path in files}


def weight(source: Source) -> int:
    """Bytes of a model's weights, as they are stored; raises as `contents`."""
    return sum(path.stat().st_size for path in _files(source)[1] if path.suffix == ".safetensors")


def _files(source: Source) -> tuple[Path, list[Path]]:
    folder = source.folder
    if folder is None:
        first = "adapter_config.json" if source.is_adapter else "config.json"
        found = source.find("modules.json") or source.need(first)
        folder = found.parent
    files = [p for p in sorted(folder.rglob("*")) if p.suffix == ".safetensors" or p.name in _CONTENT]
    return folder, [p for p in files if not any(part.startswith("checkpoint-") for part in p.relative_to(folder).parts)]


def fingerprint(source: Source) -> str:
    """One hash of `contents`."""
    whole = hashlib.sha256()
    for name, found in contents(source).items():
        whole.update(f"{name} {found}\n".encode())
    return whole.hexdigest()


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
