"""Three answers from one pass beside three pipelines: processor time and memory, of random weights.

python benchmarks/one_pass.py [small|base] [TEXTS] [WORDS] [DTYPE]
"""

from __future__ import annotations

import ctypes
import gc
import sys
import tempfile
import time
from pathlib import Path

import torch

import modernbert
from modernbert import ModernBertConfig, OnePass, Tokenizer, pipeline
from modernbert.pipelines import small_model

WORDS = [
    "the",
    "rent",
    "is",
    "due",
    "on",
    "the",
    "first",
    "day",
    "of",
    "each",
    "month",
    "and",
    "a",
    "cat",
    "sat",
    "on",
    "the",
    "mat",
    "while",
    "rain",
    "fell",
    "over",
    "Paris",
]


def resident() -> int:
    """Bytes of memory that the process holds, without what it has freed."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def best(call, times: int = 3) -> float:
    """Seconds of processor time of the fastest of several calls, which other programs change less than the clock's."""
    seconds = []
    for _ in range(times):
        begun = time.process_time()
        call()
        seconds.append(time.process_time() - begun)
    return min(seconds)


def main() -> None:
    size, count, words, dtype = [*sys.argv[1:], *["small", "64", "60", "float32"][len(sys.argv) - 1 :]]
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pretrained(small_model())
    base = ModernBertConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=2, bos_token_id=1, cls_token_id=1)
    small = modernbert.AutoConfig.from_pretrained(small_model())
    model = modernbert.ModernBertForMaskedLM(small if size == "small" else base).eval()
    texts = [
        " ".join(WORDS[(i + k) % len(WORDS)] for k in range(1 + (7 * i) % (2 * int(words)))) for i in range(int(count))
    ]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        modernbert.SentenceEncoder(model.model).save_pretrained(root / "dense")
        modernbert.SparseEncoder(model).save_pretrained(root / "sparse")
        modernbert.MultiVectorEncoder(model.model).save_pretrained(root / "late")
        for folder in ("dense", "sparse", "late"):
            tokenizer.save_pretrained(root / folder)
        del model
        places = {folder: root / folder for folder in ("dense", "sparse", "late")}
        loads = {
            "one pass": lambda: OnePass(places, dtype=dtype),
            "three pipelines": lambda: {name: pipeline(None, place, dtype=dtype) for name, place in places.items()},
        }
        made = {}
        for what, load in loads.items():
            before, begun = resident(), time.perf_counter()
            made[what] = load()
            took = time.perf_counter() - begun
            print(f"{what}: loaded in {took:.2f} s, {(resident() - before) / 2**20:,.0f} MB")
        one, own = made["one pass"], made["three pipelines"]
        alone = {folder: best(lambda serve=serve: serve(texts)) for folder, serve in own.items()}
        together = best(lambda: one(texts))
        tokens = sum(len(ids) for ids in tokenizer(texts).input_ids)
        tokenizing = best(lambda: tokenizer(texts))
        for folder, seconds in alone.items():
            print(f"{folder}: {seconds * 1e3:,.1f} ms")
        whole = sum(alone.values())
        print(f"{size}, {dtype}, {count} texts, {tokens:,} tokens, time of the processor: three passes")
        print(f"{whole * 1e3:,.1f} ms, one pass {together * 1e3:,.1f} ms, {whole / together:.2f} times as fast")
        print(f"tokenizing once {tokenizing * 1e3:,.1f} ms")


if __name__ == "__main__":
    main()
