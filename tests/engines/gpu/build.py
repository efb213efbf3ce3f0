"""Builds every kernel for a target that need not be here, and prints what came of it as JSON.

python -m tests.engines.gpu.build cuda:90
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton.language as tl

# Arguments of each kernel: p is a pointer to bfloat16, f to float32, l to int64, s to int32; i is a multiple of 16, n
# any whole number, e a float; others name the sides of a descriptor's tiles.
PRODUCT = {
    "x": "rows,inputs",
    "bias": "p",
    "T": "n",
    "inputs": "i",
    "x_stride": "i",
    "weight_stride": "i",
    "out_stride": "i",
}
TILES = {"BIAS": False, "EVEN": True, "WIDEN": False, "GROUP": 8}
KERNELS = {
    "product": (
        {**PRODUCT, "weight": "outputs,inputs", "out": "rows,half", "outputs": "i"},
        {**TILES, "ACTIVATION": "", "ADD": True},
    ),
    "gated_product": (
        {**PRODUCT, "weight": "2,half,inputs", "out": "rows,half", "P": "i"}, {**TILES, "ACTIVATION": "gelu"}
    ),
    "rotated_product": (
        {**PRODUCT, "weight": "outputs,inputs", "out": "rows,outputs", "outputs": "i", "ROTATED": "i", "cos": "f",
         "sin": "f"},
        {**TILES, "HALF": 32, "DTYPE": tl.bfloat16},
    ),
    "attend_window": (
        {"qkv": "p", "out": "p", "cu_seqlens": "s", "HEADS": "i", "row_stride": "i", "scale": "e"},
        {"LEFT": 64, "RIGHT": 64, "D": 64, "FOLDED": 64, "BEHIND": 64, "AHEAD": 192, "TILE_Q": 128, "TILE_K": 64,
         "WIDEN": False},
    ),
    "normalize": (
        {"table": "p", "ids": "l", "weight": "p", "bias": "p", "out": "p", "T": "n", "M": "i", "table_stride": "i",
         "out_stride": "i", "eps": "e"},
        {"IDS": True, "BIAS": False, "TILE_T": 4, "WIDTH": 1024},
    ),
    "rotate": (
        {"q": "p", "k": "p", "v": "p", "cos": "f", "sin": "f", "out": "p", "rows": "n", "HEADS": "i",
         "row_stride": "i", "head_stride": "i"},
        {"HALF": 32, "FOLDED": 32, "BACK": True, "TILE": 32},
    ),
    "geglu": ({"x": "p", "out": "p", "half": "i"}, {"TILE": 1024}),
    "geglu_backward": ({"x": "p", "grad": "p", "out": "p", "half": "i"}, {"TILE": 1024}),
    "cross_entropy": (
        {"logits": "p", "labels": "l", "losses": "f", "totals": "f", "V": "i", "row_stride": "i", "ignored": "n"},
        {"TILE": 4096},
    ),
    "cross_entropy_backward": (
        {"logits": "p", "labels": "l", "totals": "f", "grads": "f", "out": "p", "V": "i", "row_stride": "i",
         "ignored": "n"},
        {"TILE": 4096},
    ),
    "attend_step": (
        {"q": "p", "k": "p", "v": "p", "keys": "l", "values": "l", "rows": "l", "first": "l", "length": "l",
         "positions": "l", "key_positions": "l", "out": "p", "HEADS": "i", "left": "i", "scale": "e", "x_stride": "i"},
        {"WINDOW": True, "D": 64, "FOLDED": 64, "TILE": 64},
    ),
}  # fmt: skip
TYPES = {"p": "*bf16", "f": "*fp32", "l": "*i64", "s": "*i32", "i": "i32", "n": "i32", "e": "fp32"}
SHARED = {"cuda:80": 163, "cuda:90": 227, "hip:gfx942": 64}  # KiB of a program


def environment():
    """Ours, without what would be kept between builds."""
    return {**os.environ, "TRITON_CACHE_DIR": tempfile.mkdtemp(prefix="triton-")}


def build(name, target):
    """One kernel for one target, with each of the tiles that such a card gets."""
    import torch

    from modernbert.engines.gpu.operations import tiles

    if "TILE_I" not in _kernel(name).arg_names:
        return _built(name, target, {}, {})
    found = []
    for chosen in tiles(torch.bfloat16, SHARED[target] * 1024):
        sizes = {
            "TILE_T": chosen.rows,
            "TILE_O": chosen.outputs,
            "TILE_I": chosen.inputs,
            "COPIED": target == "cuda:90",
        }
        found.append(_built(name, target, sizes, {"num_warps": chosen.warps, "num_stages": chosen.stages}))
    return {key: min(about[key] for about in found) if key == "warpgroup" else max(about[key] for about in found)
            for key in found[0]}  # fmt: skip


def _kernel(name):
    from modernbert.engines.gpu import kernels

    return getattr(kernels, name)


def _built(name, target, sizes, options):
    import triton
    from triton.backends.compiler import GPUTarget

    kind, arch = target.split(":")
    place = GPUTarget("cuda", int(arch), 32) if kind == "cuda" else GPUTarget("hip", arch, 64)
    kernel, (arguments, constants) = _kernel(name), KERNELS[name]
    constants = {**constants, **sizes}
    assert {*arguments, *constants} == set(kernel.arg_names), name
    if sizes:
        parts = {"rows": sizes["TILE_T"], "inputs": sizes["TILE_I"], "outputs": sizes["TILE_O"],
                 "half": sizes["TILE_O"] // 2, "2": 2}  # fmt: skip

    def type_of(argument):
        if argument in TYPES:
            return TYPES[argument]
        if not sizes["COPIED"]:
            return TYPES["p"]
        return f"tensordesc<bf16[{','.join(str(parts[part]) for part in argument.split(','))}]>"

    signature = {n: type_of(arguments[n]) if n in arguments else "constexpr" for n in kernel.arg_names}
    # Pointers, widths and strides are multiples of 16 in real models; rows may be anything.
    even = [i for i, n in enumerate(kernel.arg_names) if arguments.get(n) in set("pflsi") or signature[n] == TYPES["p"]]
    source = triton.compiler.ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in even}
    )
    built = triton.compile(source, target=place, options=options)
    about = {"shared": built.metadata.shared}
    if kind == "cuda":
        about["warpgroup"] = "wgmma.mma_async" in built.asm["ptx"]
        about["spilled"] = _spilled(built.asm["ptx"], arch)
    return about


def _spilled(ptx, arch):
    """Bytes a thread that did not fit into registers, as NVIDIA's assembler says."""
    import triton

    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        arch = f"sm_{arch}" + ("a" if int(arch) >= 90 else "")
        command = [str(assembler), "-v", f"-arch={arch}", str(path), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said))


if __name__ == "__main__":
    print(json.dumps({name: build(name, sys.argv[1]) for name in KERNELS}))
