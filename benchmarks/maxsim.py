"""Speed of `maxsim` compared with torch's einsum over padded documents, and the memory of sparse encoding.

    python benchmarks/maxsim.py

1,000 documents of 20 to 300 vectors of 128 dimensions; queries of 32 vectors, einsum 8 queries at a time. Both run in
turns, the best of `--rounds` counts. Then one text of 8,192 tokens through a base-size encoder with random weights:
what its states take, and what its sparse vector takes on top.
"""

import argparse
import threading
import time

import psutil
import torch

from modernbert import ModernBertConfig, ModernBertForMaskedLM, SparseEncoder, maxsim
from modernbert.nn.packing import PackedInputs


def seconds(run):
    began = time.perf_counter()
    answer = run()
    return time.perf_counter() - began, answer


def compare(queries, dtype, rounds):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 301, (1000,), generator=generator).tolist()
    documents = torch.nn.functional.normalize(torch.randn(sum(lengths), 128, generator=generator), dim=-1).to(dtype)
    asked = torch.nn.functional.normalize(torch.randn(queries, 32, 128, generator=generator), dim=-1).to(dtype)
    padded = torch.nn.utils.rnn.pad_sequence(documents.split(lengths), batch_first=True)
    empty = torch.arange(padded.shape[1]) >= torch.tensor(lengths)[:, None]

    def einsum():
        products = (torch.einsum("qsd,ntd->qnst", some, padded) for some in asked.split(8))
        hidden = (x.masked_fill_(empty[None, :, None, :], float("-inf")).amax(-1) for x in products)
        return torch.cat([x.float().sum(-1) for x in hidden])

    best = {}
    for _ in range(rounds):
        for name, run in (("einsum", einsum), ("maxsim", lambda: maxsim(list(asked), documents, lengths))):
            took, answer = seconds(run)
            best[name] = min(best.get(name, took), took)
            best[f"{name} scores"] = torch.as_tensor(answer)
    difference = (best["einsum scores"] - best["maxsim scores"]).abs().max()
    print(
        f"{queries:>3} queries {str(dtype).removeprefix('torch.'):<9} einsum {best['einsum'] * 1e3:>8.1f} ms  maxsim "
        f"{best['maxsim'] * 1e3:>8.1f} ms  {best['einsum'] / best['maxsim']:>5.1f} times  difference {difference:.0e}"
    )


def most_memory(run):
    """MiB that a call takes at its most."""
    process, ended = psutil.Process(), threading.Event()
    before = most = process.memory_info().rss

    def watch():
        nonlocal most
        while not ended.wait(0.002):
            most = max(most, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    ended.set()
    watcher.join()
    return (most - before) / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    for queries in (1, 8, 32):
        for dtype in (torch.float32, torch.bfloat16):
            compare(queries, dtype, options.rounds)
    torch.manual_seed(0)
    encoder = SparseEncoder(ModernBertForMaskedLM(ModernBertConfig()).bfloat16()).optimize_for_inference()
    with torch.inference_mode():
        short, inputs = (PackedInputs.of_rows([[5] * n]) for n in (64, options.tokens))
        list(encoder.weigh(short))
        states = max(most_memory(lambda: encoder.model.base_model.encode(inputs)) for _ in range(2))
        whole = most_memory(lambda: list(encoder.weigh(inputs)))
    print(f"{options.tokens} tokens, base size: states {states:.0f} MiB, with the sparse vector {whole:.0f} MiB")


if __name__ == "__main__":
    main()
