"""Checkpoints on disk: safetensors, whole or in shards, and JSON. Nothing in a checkpoint is ever executed."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modernbert.errors import CheckpointError, printable
from modernbert.io.files import replacing, write_text
from modernbert.io.hub import Source

# Quantized weights have a name of their own, so that no program reads whole numbers for the floats they stand for.
PLAIN, QUANTIZED = "model", "quantized"
_WEIGHTS = "{}.safetensors"
_SHARD = "{}-{:05d}-of-{:05d}.safetensors"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _index(name: str) -> str:
    """The file that says which shard holds which tensor."""
    stem, _, variant = name.partition(".")
    return f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json"


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], max_shard_size: int | str = "5GB", name: str = PLAIN
) -> list[Path]:
    """Write tensors as `model.safetensors`, or in shards with an index where they are larger than one shard.

    Args:
        folder: made where missing. Weight files of an earlier save that this one does not use are removed last.
        tensors: by name; they are written in the order of their names, so that equal tensors give equal bytes.
        max_shard_size: bytes, or a text such as "500MB" or "5GB".
        name: what the files' names begin with; "model.fp16" is the variant "fp16", which lies beside other files.

    Returns:
        The files.
    """
    limit = _bytes(max_shard_size)
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for key in sorted(tensors):
        tensor = tensors[key].detach().contiguous().cpu()
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    numbers = range(1, len(shards) + 1)
    names = [_SHARD.format(name, i, len(shards)) for i in numbers] if len(shards) > 1 else [_WEIGHTS.format(name)]
    for file, shard in zip(names, shards, strict=True):
        with replacing(folder / file) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {key: file for file, shard in zip(names, shards, strict=True) for key in shard}
        names.append(_index(name))
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_text(folder / names[-1], json.dumps(index, indent=2) + "\n")
    _, dot, variant = name.partition(".")
    of_variant = re.escape(dot + variant)
    ours = re.compile(
        rf"({PLAIN}|{QUANTIZED})({of_variant}(-\d+-of-\d+)?\.safetensors|\.safetensors\.index{of_variant}\.json)"
    )
    for path in list(folder.iterdir()):
        if ours.fullmatch(path.name) and path.name not in names:
            path.unlink(missing_ok=True)
    return [folder / file for file in names]


def weight_files(source: Source, variant: str | None = None) -> list[Path]:
    """The safetensors files of a checkpoint, downloaded where need be; those of a variant, such as "fp16".

    Raises:
        CheckpointError: there are none, or an index names files that are missing; or there is a pickle, or an adapter,
            which changes what the weights beside it give.
    """
    source.refuse_adapter()
    plain, quantized = (stem if variant is None else f"{stem}.{variant}" for stem in (PLAIN, QUANTIZED))
    for stem in (plain, quantized):
        whole = source.find(_WEIGHTS.format(stem))
        if whole is not None:
            return [whole]
        if source.find(_index(stem)) is not None:
            where = source.read_json(_index(stem)).get("weight_map")
            if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
                place = f"{_index(stem)} of {source.name_or_folder}"
                raise CheckpointError(f"{place} has no weight_map of tensors' names and files")
            return [source.need(file) for file in sorted(set(where.values()))]
    for name in _PICKLES if variant is None else ():
        if source.exists(name):
            raise CheckpointError(
                f"{source.name_or_folder} holds its weights as {name}, a pickle, which can run code when it is "
                "loaded. Convert it where you trust it: `import torch; from safetensors.torch import save_file; "
                "save_file({k: v.clone() for k, v in torch.load('pytorch_model.bin', weights_only=True).items()}, "
                "'model.safetensors', metadata={'format': 'pt'})`"
            )
    offline = "" if source.folder else ", or they are not in the cache and the Hub cannot be reached"
    wanted = f"{_WEIGHTS.format(plain)} nor {_index(plain)}"
    raise CheckpointError(f"{source.folder or source.name_or_folder} holds neither {wanted}{offline}")


Names = dict[str, tuple[Path, tuple[int, ...], str]]


def weight_names(files: list[Path]) -> Names:
    """Of each tensor in these files: its file, its shape, and its dtype as safetensors spells it ("F32")."""
    names: Names = {}
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                piece = file.get_slice(name)
                names[name] = (path, tuple(piece.get_shape()), piece.get_dtype())
    return names


def names_of(tensors: Mapping[str, Tensor]) -> Names:
    """What `weight_names` says of files, of tensors that are at hand."""
    floats = {dtype: spelled for spelled, dtype in _FLOATS.items()}
    return {n: (Path(), tuple(t.shape), floats.get(t.dtype, str(t.dtype))) for n, t in tensors.items()}


def read_weights(files: list[Path], wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors one by one, so that no more than one of them exists beside what the caller keeps."""
    for path in files:
        with _opened(path) as file:
            yield from ((name, file.get_tensor(name)) for name in filter(wanted, file.keys()))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {printable(str(error), limit=200)}") from error


def dtype_of(names: Names) -> torch.dtype | None:
    """The floating dtype that most of a checkpoint's numbers have; None where there are none."""
    counts: Counter[torch.dtype] = Counter()
    for _, shape, dtype in names.values():
        if dtype in _FLOATS:
            counts[_FLOATS[dtype]] += math.prod(shape)
    return counts.most_common(1)[0][0] if counts else None


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", size.upper())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"max_shard_size is {size!r}; give bytes or a text such as '500MB' or '5GB'")
    return int(float(match[1]) * _UNITS[match[2]])
