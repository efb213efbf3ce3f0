"""What a card does with the models, beside what it can do at most and beside transformers: one run, one table.

    python benchmarks/gpu.py --out gpu.json                 # on a card, at most eight minutes
    python benchmarks/gpu.py --smoke --device cpu           # the same code on small models, to see that it works

Random base-size weights in bfloat16. Only real tokens count, and only the pairs of tokens that see each other: padding
and what a window hides earn nothing. Times are of the card's own clock over repeated passes, the fastest of them;
peers get texts sorted by length, and the best of several batch sizes. What no time is left for is left out by name.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import modernbert
from modernbert import ModernBertConfig, ModernBertDecoderConfig
from modernbert.bench.measure import lengths_of, useful_flops
from modernbert.gpu import operations as gpu

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
         "vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2,
         "sep_token_id": 2}  # fmt: skip
BASE = {"vocab_size": 50368, "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22,
        "num_attention_heads": 12}  # fmt: skip
WORKLOADS = ["var1024", "long64", "128x512", "8x8192"]
LATENCIES = ["1x16", "1x128", "8x128"]
BATCHES = [8, 32, 128]


class Bench:
    """One run: where, how long, and what was found so far."""

    def __init__(self, device: torch.device, smoke: bool, seconds: float) -> None:
        self.device, self.smoke = device, smoke
        self.until = time.monotonic() + seconds
        self.dtype = torch.float32 if smoke else torch.bfloat16
        self.found: dict[str, Any] = {}
        self.skipped: list[str] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    @contextlib.contextmanager
    def section(self, name: str, least: float = 20.0) -> Iterator[dict[str, Any]]:
        """A part of the table; what breaks in it is written down, and the others go on."""
        part: dict[str, Any] = {}
        begun = time.monotonic()
        if self.left < least and not self.smoke:
            self.skipped.append(name)
            print(f"{name}: no time left")
            part["skip"] = True
            yield part
            return
        try:
            yield part
        except Exception as error:  # a table with a hole says more than none
            part["error"] = f"{type(error).__name__}: {error}"[:500]
        part["took"] = round(time.monotonic() - begun, 1)
        self.found[name] = part
        print(f"{name}: {json.dumps(part)}", flush=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def seconds(self, run: Callable[[], object], budget: float = 2.0, least: int = 3) -> float:
        """Of the fastest of several runs, after two that do not count."""
        run()
        run()
        times: list[float] = []
        while len(times) < least or (sum(times) < budget and len(times) < 200):
            times.append(self._once(run))
        return min(times)

    def _once(self, run: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def memory(self, run: Callable[[], object]) -> float:
        """GiB at the most while it runs, weights included."""
        if self.device.type != "cuda":
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**30


def texts(lengths: list[int], vocabulary: int) -> tuple[Tensor, Tensor]:
    """Ids end to end on the host, and where each text begins."""
    ids = torch.randint(5, vocabulary - 5, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    return ids, torch.tensor([0, *lengths]).cumsum(0).int()


def padded(ids: Tensor, lengths: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The same texts as a grid and its mask, on the card."""
    grid, mask = torch.zeros(len(lengths), max(lengths), dtype=torch.int64), torch.zeros(len(lengths), max(lengths))
    for row, real, part in zip(grid, mask, ids.split(lengths), strict=True):
        row[: len(part)], real[: len(part)] = part, 1
    return grid.to(device), mask.long().to(device)


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative, over all numbers."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def encoders(bench: Bench, sizes: dict[str, int]) -> tuple[Any, Any, Any, Any]:
    """The same weights in float32, plain, served, and in transformers."""
    import transformers

    torch.manual_seed(0)
    config = ModernBertConfig(**sizes)
    oracle = modernbert.ModernBertModel(config, "sdpa").eval()
    models = []
    for optimized in (False, True):
        model = modernbert.ModernBertModel(config).eval()
        model.load_state_dict(oracle.state_dict())
        model = model.to(bench.device, bench.dtype)
        models.append(model.optimize_for_inference() if optimized else model)
    peer_config = transformers.ModernBertConfig(**sizes)
    peer_config._attn_implementation = "sdpa"
    peer = transformers.ModernBertModel(peer_config).eval()
    peer.load_state_dict(oracle.state_dict())
    return oracle.to(bench.device), *models, peer.to(bench.device, bench.dtype)


def limits(bench: Bench) -> None:
    """What the card does at most: products of matrices, and copying."""
    with bench.section("limits", 0) as part:
        sizes = [256] if bench.smoke else [4096, 8192, 16384]
        best = 0.0
        for size in sizes:
            a, b = (torch.randn(size, size, device=bench.device, dtype=bench.dtype) for _ in range(2))
            best = max(best, 2 * size**3 / bench.seconds(lambda a=a, b=b: a @ b, 1.0))
        source = torch.ones(2**20 if bench.smoke else 2**31, dtype=torch.int8, device=bench.device)
        target = torch.empty_like(source)
        part["tflops"] = best / 1e12
        part["gigabytes"] = 2 * source.numel() / bench.seconds(lambda: target.copy_(source), 1.0) / 1e9


def products(bench: Bench, sizes: dict[str, int]) -> None:
    """Our products beside PyTorch's, on the shapes of a layer; TFLOP/s."""
    if not gpu.serving(bench.dtype, bench.device):
        bench.skipped.append("products")
        return
    rows, M, inner = 65536, sizes["hidden_size"], sizes["intermediate_size"]
    heads = sizes["num_attention_heads"]
    with bench.section("products") as part:
        cos, sin = (torch.randn(rows, 1, M // heads, device=bench.device) for _ in range(2))
        for name, (inputs, outputs) in {
            "qkv": (M, 3 * M), "out": (M, M), "gate": (M, 2 * inner), "down": (inner, M),
        }.items():  # fmt: skip
            x = torch.randn(rows, inputs, device=bench.device, dtype=bench.dtype)
            weight = torch.randn(outputs, inputs, device=bench.device, dtype=bench.dtype)
            stream = torch.randn(rows, outputs, device=bench.device, dtype=bench.dtype)
            ours = {
                "qkv": lambda x=x, w=weight: gpu.rotated_product(x, w, None, cos, sin),
                "gate": lambda x=x, w=weight: gpu.gated_product(x, w, None, "gelu"),
            }.get(name, lambda x=x, w=weight, s=stream: gpu.product(x, w, add_to=s))
            flops = 2.0 * rows * inputs * outputs / 1e12
            part[name] = {
                "ours, fused": flops / bench.seconds(ours, 0.5),
                "ours": flops / bench.seconds(lambda x=x, w=weight: gpu.product(x, w), 0.5),
                "pytorch": flops / bench.seconds(lambda x=x, w=weight: F.linear(x, w), 0.5),
            }


@torch.inference_mode()
def exactness(bench: Bench, sizes: dict[str, int], models: tuple[Any, Any, Any, Any]) -> None:
    """How far from float32, beside transformers; and whether a text's bits follow from its batch."""
    oracle, plain, served, peer = models
    with bench.section("exactness") as part:
        lengths = [40, 17, 9] if bench.smoke else [300, 512, 17, 1, 1500]
        ids, starts = texts(lengths, sizes["vocab_size"])
        wanted = oracle(ids, cu_seqlens=starts)[0]
        whole = served(ids, cu_seqlens=starts)[0]
        parts = ids.split(lengths)
        theirs = torch.cat([peer(one[None].to(bench.device))[0][0] for one in parts])
        part["error, served"] = error(whole, wanted)
        part["error, plain"] = error(plain(ids, cu_seqlens=starts)[0], wanted)
        part["error, transformers"] = error(theirs, wanted)
        alone = [served(one, cu_seqlens=torch.tensor([0, len(one)]))[0] for one in parts]
        part["same bits alone"] = all(map(torch.equal, alone, whole.split(lengths)))
        filling, _ = texts([100 if bench.smoke else 4000] * 3, sizes["vocab_size"])
        more = torch.tensor([0, *lengths, *[len(filling) // 3] * 3]).cumsum(0).int()
        large = served(torch.cat([ids, filling]), cu_seqlens=more)[0]
        part["same bits in a large batch"] = torch.equal(large[: len(ids)], whole)


@torch.inference_mode()
def encoding(bench: Bench, sizes: dict[str, int], models: tuple[Any, Any, Any, Any]) -> None:
    """Real tokens a second; the share of the card's products that is useful work; peak memory."""
    _, plain, served, peer = models
    peak = bench.found["limits"]["tflops"]
    workloads = ["var8", "2x64"] if bench.smoke else WORKLOADS

    def peer_run(model: Any, ids: Tensor, lengths: list[int], size: int) -> Callable[[], object]:
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        parts = ids.split(lengths)
        batches = []
        for first in range(0, len(order), size):
            some = order[first : first + size]
            batches.append(padded(torch.cat([parts[i] for i in some]), [lengths[i] for i in some], bench.device))

        def run() -> None:
            for grid, mask in batches:
                model(input_ids=grid, attention_mask=mask)

        return run

    for workload in workloads:
        lengths = lengths_of(workload)
        ids, starts = texts(lengths, sizes["vocab_size"])
        flops = useful_flops(served.config, lengths) / 1e12
        with bench.section(f"encode {workload}") as part:
            if "skip" in part:
                continue
            part["tokens"] = len(ids)

            def ours(ids: Tensor = ids, starts: Tensor = starts) -> object:
                return served(ids, cu_seqlens=starts)

            took = bench.seconds(ours, 3.0)
            part["ours"] = {"tokens a second": len(ids) / took, "share of peak": flops / took / peak}
            part["ours"]["GiB"] = bench.memory(ours)
            took = bench.seconds(lambda ids=ids, starts=starts: plain(ids, cu_seqlens=starts), 2.0)
            part["ours, plain"] = {"tokens a second": len(ids) / took, "share of peak": flops / took / peak}
            best: dict[str, Any] = {}
            for size in BATCHES[:1] if bench.smoke else BATCHES:
                if size * max(lengths) > 2**18:
                    continue  # its masks alone would fill the card
                run = peer_run(peer, ids, lengths, size)
                took = bench.seconds(run, 1.5, 2)
                if len(ids) / took > best.get("tokens a second", 0.0):
                    best = {"tokens a second": len(ids) / took, "batch": size, "GiB": bench.memory(run)}
            part["transformers, sdpa"] = best
            part["times transformers"] = part["ours"]["tokens a second"] / best["tokens a second"]
    compiled = None
    for workload in workloads:
        with bench.section(f"compiled peer {workload}", 60) as part:
            if "skip" in part:
                continue
            if compiled is None:
                compiled = torch.compile(peer, dynamic=True, backend="eager" if bench.smoke else "inductor")
            lengths = lengths_of(workload)
            ids, _ = texts(lengths, sizes["vocab_size"])
            size = bench.found[f"encode {workload}"]["transformers, sdpa"]["batch"]
            took = bench.seconds(peer_run(compiled, ids, lengths, size), 1.5, 2)
            part["tokens a second"] = len(ids) / took
            ours = bench.found[f"encode {workload}"]["ours"]["tokens a second"]
            part["times compiled transformers"] = ours * took / len(ids)


@torch.inference_mode()
def latency(bench: Bench, sizes: dict[str, int], models: tuple[Any, Any, Any, Any]) -> None:
    """Milliseconds of a short batch from ids on the host to vectors on the card."""
    _, _, served, peer = models
    with bench.section("latency, ms") as part:
        for workload in LATENCIES[:1] if bench.smoke else LATENCIES:
            lengths = lengths_of(workload)
            ids, starts = texts(lengths, sizes["vocab_size"])
            grid, mask = padded(ids, lengths, torch.device("cpu"))
            part[workload] = {
                "ours": 1e3 * bench.seconds(lambda ids=ids, starts=starts: served(ids, cu_seqlens=starts), 1.0, 20),
                "transformers": 1e3 * bench.seconds(
                    lambda grid=grid, mask=mask: peer(
                        input_ids=grid.to(bench.device), attention_mask=mask.to(bench.device)
                    ), 1.0, 10,
                ),
            }  # fmt: skip


def training(bench: Bench, sizes: dict[str, int]) -> None:
    """A step of masked language modelling over packed texts of 1,024 tokens, a third of which have labels."""
    import transformers

    peak = bench.found["limits"]["tflops"]
    length, count = (32, 4) if bench.smoke else (1024, 64)
    ids, starts = texts([length] * count, sizes["vocab_size"])
    labels = torch.where(torch.rand(len(ids), generator=torch.Generator().manual_seed(1)) < 0.3, ids, -100)
    config = ModernBertConfig(**sizes, sparse_prediction=True)
    flops = 3 * useful_flops(config, [length] * count) / 1e12  # the backward does the forward's work twice
    flops += 3 * 2 * int((labels >= 0).sum()) * sizes["hidden_size"] * sizes["vocab_size"] / 1e12
    torch.manual_seed(0)
    ours = modernbert.ModernBertForMaskedLM(config).to(bench.device, bench.dtype).train()
    peer_config = transformers.ModernBertConfig(**sizes, sparse_prediction=True)
    peer_config._attn_implementation = "sdpa"

    def step(model: Any, given: list[dict[str, Tensor]]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), fused=bench.device.type == "cuda")

        def run() -> None:
            for one in given:
                model(**one).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    with bench.section("training step") as part:
        if "skip" in part:
            return
        run = step(ours, [{"input_ids": ids, "cu_seqlens": starts, "labels": labels}])
        took = bench.seconds(run, 4.0)
        part["ours"] = {
            "tokens a second": len(ids) / took,
            "share of peak": flops / took / peak,
            "GiB": bench.memory(run),
        }
    del ours
    with bench.section("training step, transformers") as part:
        if "skip" in part:
            return
        peer = transformers.ModernBertForMaskedLM(peer_config).to(bench.device, bench.dtype).train()
        grids = ids.view(count, length).to(bench.device).split(16)
        marks = labels.view(count, length).to(bench.device).split(16)
        run = step(peer, [{"input_ids": g, "labels": m} for g, m in zip(grids, marks, strict=True)])
        took = bench.seconds(run, 3.0)
        part["tokens a second"] = len(ids) / took
        part["GiB"] = bench.memory(run)


@torch.inference_mode()
def generation(bench: Bench, sizes: dict[str, int]) -> None:
    """Tokens a second of greedy decoding."""
    import transformers

    torch.manual_seed(0)
    ours = modernbert.ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**sizes)).eval()
    peer_config = transformers.ModernBertDecoderConfig(**sizes)
    peer_config._attn_implementation = "sdpa"
    peer = transformers.ModernBertDecoderForCausalLM(peer_config).eval()
    peer.load_state_dict(ours.state_dict(), strict=False)
    ours = ours.to(bench.device, bench.dtype).optimize_for_inference()
    peer = peer.to(bench.device, bench.dtype)
    prompt, new = (8, 6) if bench.smoke else (128, 128)
    for batch in [2] if bench.smoke else [1, 32]:
        with bench.section(f"generate {batch} x ({prompt} + {new})") as part:
            ids = torch.randint(5, sizes["vocab_size"] - 5, (batch, prompt)).to(bench.device)
            options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
            for name, model in (("ours", ours), ("transformers", peer)):
                took = bench.seconds(
                    lambda model=model, ids=ids, options=options: model.generate(ids, **options), 2.0, 2
                )
                part[name] = {"tokens a second": batch * new / took, "ms a step": 1e3 * took / new}


def table(found: dict[str, Any]) -> str:
    """What was found, as Markdown."""
    lines = ["| | tokens/s | share of peak | GiB | transformers, sdpa | times |", "|---|---|---|---|---|---|"]
    for name, part in found.items():
        if not name.startswith("encode ") or "ours" not in part:
            continue
        ours, peer = part["ours"], part.get("transformers, sdpa", {})
        lines.append(
            f"| {name[7:]} | {ours['tokens a second']:,.0f} | {ours['share of peak']:.0%} | {ours['GiB']:.1f} | "
            f"{peer.get('tokens a second', 0):,.0f} | {part.get('times transformers', 0):.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="where to measure")
    parser.add_argument("--seconds", type=float, default=440, help="when to begin nothing more")
    parser.add_argument("--out", type=Path, help="a JSON file for what was found")
    parser.add_argument("--smoke", action="store_true", help="small models, to see that everything runs")
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --smoke --device cpu shows that the code runs")
    device = torch.device("cuda", device.index or 0) if device.type == "cuda" else device
    bench = Bench(device, given.smoke, given.seconds)
    sizes = SMALL if given.smoke else BASE
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    bench.found["machine"] = {"device": name, "torch": torch.__version__, "dtype": str(bench.dtype)}
    print(json.dumps(bench.found["machine"]))
    limits(bench)
    products(bench, sizes)
    models = encoders(bench, sizes)
    exactness(bench, sizes, models)
    latency(bench, sizes, models)
    training(bench, sizes)
    generation(bench, sizes)
    encoding(bench, sizes, models)  # last: compiling peers takes what time is left
    bench.found["skipped"] = bench.skipped
    print(table(bench.found))
    if given.out is not None:
        given.out.write_text(json.dumps(bench.found, indent=2) + "\n")


if __name__ == "__main__":
    main()
