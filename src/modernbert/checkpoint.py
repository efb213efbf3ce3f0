"""Checkpoints on disk: safetensors, whole or in shards, and JSON. Nothing in a checkpoint is ever executed."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modernbert.errors import CheckpointError
from modernbert.files import replacing, write_text
from modernbert.hub import Source

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = "model-{:05d}-of-{:05d}.safetensors"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def write_weights(folder: Path, tensors: Mapping[str, Tensor], max_shard_size: int | str = "5GB") -> None:
    """Write tensors as `model.safetensors`, or in shards with an index where they are larger than one shard.

    Args:
        folder: made where missing. Weight files of an earlier save that this one does not use are removed last.
        tensors: by name; they are written in the order of their names, so that equal tensors give equal bytes.
        max_shard_size: bytes, or a text such as "500MB" or "5GB".
    """
    limit = _bytes(max_shard_size)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = [_SHARD.format(i + 1, len(shards)) for i in range(len(shards))] if len(shards) > 1 else [WEIGHTS]
    for name, shard in zip(names, shards, strict=True):
        with replacing(folder / name) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(t.nbytes for shard in shards for t in shard.values())
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
        names.append(INDEX)
    for stale in (*folder.glob("model*.safetensors"), folder / INDEX):
        if stale.name not in names and re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", stale.name):
            stale.unlink(missing_ok=True)


def weight_files(source: Source) -> list[Path]:
    """The safetensors files of a checkpoint, downloaded where need be.

    Raises:
        CheckpointError: there are none, or an index names files that are missing. A pickle is refused with the
            way to convert it.
    """
    whole = source.find(WEIGHTS)
    if whole is not None:
        return [whole]
    if source.find(INDEX) is not None:
        index = source.read_json(INDEX)
        if not isinstance(index.get("weight_map"), dict) or not index["weight_map"]:
            raise CheckpointError(f"{INDEX} of {source.name_or_folder} has no weight_map")
        return [source.need(str(name)) for name in sorted(set(index["weight_map"].values()))]
    for name in _PICKLES:
        if source.exists(name):
            raise CheckpointError(
                f"{source.name_or_folder} holds its weights as {name}, a pickle, which can run code when it is "
                "loaded. Convert it where you trust it: `import torch; from safetensors.torch import save_file; "
                "save_file({k: v.clone() for k, v in torch.load('pytorch_model.bin', weights_only=True).items()}, "
                "'model.safetensors', metadata={'format': 'pt'})`"
            )
    offline = "" if source.folder else ", or they are not in the cache and the Hub cannot be reached"
    raise CheckpointError(f"{source.folder or source.name_or_folder} holds neither {WEIGHTS} nor {INDEX}{offline}")


def weight_names(files: list[Path]) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """Of each tensor in these files: its file, its shape, and its dtype as safetensors spells it ("F32")."""
    names: dict[str, tuple[Path, tuple[int, ...], str]] = {}
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                piece = file.get_slice(name)
                names[name] = (path, tuple(piece.get_shape()), piece.get_dtype())
    return names


def read_weights(files: list[Path], wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors one by one, so that no more than one of them exists beside what the caller keeps."""
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if wanted(name):
                    yield name, file.get_tensor(name)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def dtype_of(names: Mapping[str, tuple[Path, tuple[int, ...], str]]) -> torch.dtype | None:
    """The floating dtype that most of a checkpoint's numbers have; None where there are none."""
    spelled = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    counts: dict[torch.dtype, int] = {}
    for _, shape, dtype in names.values():
        if dtype in spelled:
            numbers = torch.Size(shape).numel()
            counts[spelled[dtype]] = counts.get(spelled[dtype], 0) + numbers
    return max(counts, key=lambda d: counts[d]) if counts else None


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", size.upper())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"max_shard_size is {size!r}; give bytes or a text such as '500MB' or '5GB'")
    return int(float(match[1]) * _UNITS[match[2]])
