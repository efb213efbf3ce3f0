"""Speed of the models on a GPU, compared with the limits of the GPU and with transformers: one run, one table.

    python benchmarks/gpu.py --out gpu.json                 # on a GPU, at most eight minutes
    python benchmarks/gpu.py --smoke --device cpu           # the same code on small models, to check that it works

Random base-size weights in bfloat16. Only real tokens count, and only pairs of tokens that attend to each other. A time
is that of the fastest of several forward passes, from ids on the host to the GPU's last result; matrix products are
timed by the GPU itself. Peers get texts sorted by length on the GPU, no mask where none is needed, and the best of
several batch sizes. Memory is what a pass takes in addition to the weights.

Each group of parts runs in a process of its own, which is ended when its time is over; what was measured until then is
kept.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import modernbert
from modernbert import ModernBertConfig, ModernBertDecoderConfig
from modernbert.engines.gpu import operations as gpu
from modernbert.tools.bench import lengths_of, useful_flops

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
         "vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2,
         "sep_token_id": 2}  # fmt: skip
BASE = {"vocab_size": 50368, "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22,
        "num_attention_heads": 12}  # fmt: skip
WORKLOADS = ["var1024", "long64", "128x512", "8x8192"]
LATENCIES = ["1x16", "1x128", "8x128"]
BATCHES = [8, 32, 128]

Part = dict[str, Any]


class Bench:
    """What one process measures.

    Args:
        device: where.
        smoke: on small models.
        out: gets what was found after every part.
        found: by the processes before this one.
    """

    def __init__(self, device: torch.device, smoke: bool, out: Path, found: dict[str, Part]) -> None:
        self.device, self.smoke, self.out, self.found = device, smoke, out, found
        self.dtype = torch.float32 if smoke else torch.bfloat16
        self.sizes = SMALL if smoke else BASE

    @property
    def peak(self) -> float:
        """TFLOP/s of the fastest product seen; 0 where none was."""
        return float(self.found.get("limits", {}).get("tflops", 0.0))

    def measure(self, name: str, fill: Callable[[Part], None]) -> None:
        """One part of the table; what breaks in it is written down, and the others go on."""
        part: Part = {}
        begun = time.monotonic()
        try:
            fill(part)
        except Exception:  # a table with a hole says more than none
            part["error"] = traceback.format_exc()[-1500:]
        part["took"] = round(time.monotonic() - begun, 1)
        self.found[name] = part
        print(f"{name}: {json.dumps(part)}", flush=True)
        _write(self.out, self.found)
        gc.collect()
        if self.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # of a card that is lost; the next parts say so
                torch.cuda.empty_cache()

    def share(self, teraflops: float) -> float:
        """Of what the card's products reach at most."""
        return teraflops / self.peak if self.peak else 0.0

    def seconds(self, run: Callable[[], object], budget: float = 2.0, least: int = 3) -> float:
        """Of the fastest of several runs, after three that do not count: launches are recorded in the second."""
        for _ in range(3):
            self._once(run)
        times: list[float] = []
        while len(times) < least or (sum(times) < budget and len(times) < 200):
            times.append(self._once(run))
        return min(times)

    def _once(self, run: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def on_card(self, run: Callable[[], object], times: int = 20) -> float:
        """Seconds of one of several runs that were launched back to back, by the card's own clock."""
        run()
        if self.device.type != "cuda":
            return self.seconds(run, 0.2)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        best = float("inf")
        for _ in range(3):
            begin.record()
            for _ in range(times):
                run()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3 / times)
        return best

    def memory(self, run: Callable[[], object]) -> float:
        """GiB at the most while it runs, beside what was there before."""
        if self.device.type != "cuda":
            return 0.0
        self._wait()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        self._wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**30


def _write(path: Path, found: dict[str, Part]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, indent=2) + "\n")
    temporary.replace(path)


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


def peer_of(config: Any, model: Any, bench: Bench) -> Any:
    """A model of transformers on the card, with the frequencies of its rotation in float32, as loading leaves them."""
    model = model.to(bench.device, bench.dtype)
    for module in model.modules():
        if hasattr(module, "rotary_emb"):
            module.rotary_emb = type(module.rotary_emb)(config).to(bench.device)
    return model


def encoder_and_peer(bench: Bench) -> tuple[Any, Any, Any, Any]:
    """The same weights in float32, plain, served, and in transformers."""
    import transformers

    torch.manual_seed(0)
    config = ModernBertConfig(**bench.sizes)
    oracle = modernbert.ModernBertModel(config, "sdpa").eval()
    models = []
    for optimized in (False, True):
        model = modernbert.ModernBertModel(config).eval()
        model.load_state_dict(oracle.state_dict())
        model = model.to(bench.device, bench.dtype)
        models.append(model.optimize_for_inference() if optimized else model)
    peer_config = transformers.ModernBertConfig(**bench.sizes)
    peer_config._attn_implementation = "sdpa"
    peer = transformers.ModernBertModel(peer_config).eval()
    peer.load_state_dict(oracle.state_dict())
    return oracle.to(bench.device), *models, peer_of(peer_config, peer, bench)


def machine(bench: Bench) -> None:
    """What the card does at most; our products beside PyTorch's on the shapes of a layer."""
    bench.measure("limits", functools.partial(limits, bench))
    if gpu.serving(bench.dtype, bench.device):
        bench.measure("products, TFLOP/s", functools.partial(products, bench))


def limits(bench: Bench, part: Part) -> None:
    """Products of matrices, and copying."""
    best = 0.0
    for size in [256] if bench.smoke else [4096, 8192, 16384]:
        a, b = (torch.randn(size, size, device=bench.device, dtype=bench.dtype) for _ in range(2))
        best = max(best, 2 * size**3 / bench.on_card(functools.partial(torch.mm, a, b)))
    source = torch.ones(2**20 if bench.smoke else 2**31, dtype=torch.int8, device=bench.device)
    target = torch.empty_like(source)
    part["device"] = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "cpu"
    part["torch"], part["dtype"] = torch.__version__, str(bench.dtype)
    part["tflops"] = best / 1e12
    part["gigabytes"] = 2 * source.numel() / bench.on_card(lambda: target.copy_(source)) / 1e9


def products(bench: Bench, part: Part) -> None:
    """Those of a layer, over 65,536 rows."""
    rows, M, inner = 65536, bench.sizes["hidden_size"], bench.sizes["intermediate_size"]
    cos, sin = (torch.randn(rows, 1, M // bench.sizes["num_attention_heads"], device=bench.device) for _ in range(2))
    for name, (inputs, outputs) in {
        "qkv": (M, 3 * M),
        "out": (M, M),
        "gate": (M, 2 * inner),
        "down": (inner, M),
    }.items():
        x = torch.randn(rows, inputs, device=bench.device, dtype=bench.dtype)
        weight = torch.randn(outputs, inputs, device=bench.device, dtype=bench.dtype)
        stream = torch.randn(rows, outputs, device=bench.device, dtype=bench.dtype)
        fused: Callable[[], Tensor] = functools.partial(gpu.product, x, weight, add_to=stream)
        if name == "qkv":
            fused = functools.partial(gpu.rotated_product, x, weight, None, cos, sin)
        elif name == "gate":
            fused = functools.partial(gpu.gated_product, x, weight, None, "gelu")
        flops = 2.0 * rows * inputs * outputs / 1e12
        part[name] = {
            "ours, fused": flops / bench.on_card(fused),
            "ours": flops / bench.on_card(functools.partial(gpu.product, x, weight)),
            "pytorch": flops / bench.on_card(functools.partial(F.linear, x, weight)),
        }


@torch.inference_mode()
def encode(bench: Bench) -> None:
    """Tokens a second, exactness, and latency."""
    models = encoder_and_peer(bench)
    _, plain, served, peer = models
    for workload in ["var8", "2x64"] if bench.smoke else WORKLOADS:
        bench.measure(f"encode {workload}", functools.partial(encoding, bench, workload, plain, served, peer))
    bench.measure("exactness", lambda part: exactness(bench, part, *models))  # the first that records launches
    bench.measure("latency, ms", lambda part: latency(bench, part, served, peer))


def exactness(bench: Bench, part: Part, oracle: Any, plain: Any, served: Any, peer: Any) -> None:
    """How far from float32, beside transformers; and whether a text's bits follow from its batch."""
    lengths = [40, 17, 9] if bench.smoke else [300, 512, 17, 1, 1500]
    ids, starts = texts(lengths, bench.sizes["vocab_size"])
    wanted = oracle(ids, cu_seqlens=starts)[0]
    whole = served(ids, cu_seqlens=starts)[0]
    parts = ids.split(lengths)
    theirs = torch.cat([peer(one[None].to(bench.device))[0][0] for one in parts])
    part["error, served"] = error(whole, wanted)
    part["error, plain"] = error(plain(ids, cu_seqlens=starts)[0], wanted)
    part["error, transformers"] = error(theirs, wanted)
    same = True
    for _ in range(3):  # computed, recorded, replayed
        same &= torch.equal(served(ids, cu_seqlens=starts)[0], whole)
        alone = [served(one, cu_seqlens=torch.tensor([0, len(one)]))[0] for one in parts]
        same &= all(map(torch.equal, alone, whole.split(lengths)))
    part["same bits alone"] = same
    filling, _ = texts([100 if bench.smoke else 6000] * 3, bench.sizes["vocab_size"])
    more = torch.tensor([0, *lengths, *[len(filling) // 3] * 3]).cumsum(0).int()
    large = served(torch.cat([ids, filling]), cu_seqlens=more)[0]
    part["same bits in a large batch"] = torch.equal(large[: len(ids)], whole)


def latency(bench: Bench, part: Part, served: Any, peer: Any) -> None:
    """Of a short batch from ids on the host to vectors on the card."""
    for workload in LATENCIES[:1] if bench.smoke else LATENCIES:
        lengths = lengths_of(workload)
        ids, starts = texts(lengths, bench.sizes["vocab_size"])
        grid = ids.view(len(lengths), -1)
        ours = functools.partial(served, ids, cu_seqlens=starts)
        theirs = functools.partial(_send_and_run, peer, grid, bench.device)
        part[workload] = {
            "ours": 1e3 * bench.seconds(ours, 1.0, 20),
            "transformers": 1e3 * bench.seconds(theirs, 1.0, 10),
        }


def _send_and_run(model: Any, grid: Tensor, device: torch.device) -> object:
    return model(input_ids=grid.to(device))


def peer_run(bench: Bench, model: Any, ids: Tensor, lengths: list[int], size: int) -> Callable[[], None]:
    """All texts through a model of transformers, in batches of texts of like length."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    parts, batches = ids.split(lengths), []
    for first in range(0, len(order), size):
        some = order[first : first + size]
        grid, mask = padded(torch.cat([parts[i] for i in some]), [lengths[i] for i in some], bench.device)
        batches.append({"input_ids": grid} if bool(mask.all()) else {"input_ids": grid, "attention_mask": mask})

    def run() -> None:
        for batch in batches:
            model(**batch)

    return run


def encoding(bench: Bench, workload: str, plain: Any, served: Any, peer: Any, part: Part) -> None:
    """Real tokens a second; the share of the card's products that is useful work; memory."""
    lengths = lengths_of(workload)
    ids, starts = texts(lengths, bench.sizes["vocab_size"])
    flops = useful_flops(served.config, lengths) / 1e12
    part["tokens"] = len(ids)
    for name, model in (("ours", served), ("ours, plain", plain)):
        run = functools.partial(model, ids, cu_seqlens=starts)
        took = bench.seconds(run, 2.0)
        part[name] = {"tokens a second": len(ids) / took, "share of peak": bench.share(flops / took)}
        part[name]["GiB"] = bench.memory(run)
    for size in BATCHES[:1] if bench.smoke else BATCHES:
        if size > BATCHES[0] and size * max(lengths) >= 2**18:
            continue  # its masks alone would fill the card
        theirs = peer_run(bench, peer, ids, lengths, size)
        speed = len(ids) / bench.seconds(theirs, 1.0, 1)
        if speed > part.get("transformers, sdpa", {}).get("tokens a second", 0.0):
            part["transformers, sdpa"] = {"tokens a second": speed, "batch": size, "GiB": bench.memory(theirs)}
            part["times transformers"] = part["ours"]["tokens a second"] / speed


@torch.inference_mode()
def compiled(bench: Bench) -> None:
    """transformers under torch.compile, at the batch size that was best without."""
    peer = encoder_and_peer(bench)[3]
    model = torch.compile(peer, dynamic=True, backend="eager" if bench.smoke else "inductor")

    def fill(workload: str, part: Part) -> None:
        before = bench.found[f"encode {workload}"]
        lengths = lengths_of(workload)
        ids, _ = texts(lengths, bench.sizes["vocab_size"])
        took = bench.seconds(peer_run(bench, model, ids, lengths, before["transformers, sdpa"]["batch"]), 1.0, 1)
        part["tokens a second"] = len(ids) / took
        part["times compiled transformers"] = before["ours"]["tokens a second"] * took / len(ids)

    for workload in ["var8", "2x64"] if bench.smoke else WORKLOADS:
        if "times transformers" in bench.found.get(f"encode {workload}", {}):
            bench.measure(f"compiled peer {workload}", functools.partial(fill, workload))


def train(bench: Bench) -> None:
    """Masked language modelling over packed texts of 1,024 tokens, a third of which have labels."""
    import transformers

    length, count = (32, 4) if bench.smoke else (1024, 64)
    ids, starts = texts([length] * count, bench.sizes["vocab_size"])
    labels = torch.where(torch.rand(len(ids), generator=torch.Generator().manual_seed(1)) < 0.3, ids, -100)
    config = ModernBertConfig(**bench.sizes, sparse_prediction=True)
    flops = 3 * useful_flops(config, [length] * count) / 1e12  # the backward does the forward's work twice
    flops += 3 * 2 * int((labels >= 0).sum()) * bench.sizes["hidden_size"] * bench.sizes["vocab_size"] / 1e12

    def step(model: Any, given: list[dict[str, Tensor]], autocast: bool = False) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), fused=bench.device.type == "cuda")

        def run() -> None:
            for one in given:
                with torch.autocast(bench.device.type, torch.bfloat16, enabled=autocast):
                    loss = model(**one).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    def ours(dtype: torch.dtype, autocast: bool, part: Part) -> None:
        torch.manual_seed(0)
        model = modernbert.ModernBertForMaskedLM(config).to(bench.device, dtype).train()
        run = step(model, [{"input_ids": ids, "cu_seqlens": starts, "labels": labels}], autocast)
        took = bench.seconds(run, 3.0)
        part["tokens a second"], part["share of peak"] = len(ids) / took, bench.share(flops / took)
        part["GiB"] = bench.memory(run)

    def theirs(part: Part) -> None:
        peer_config = transformers.ModernBertConfig(**bench.sizes, sparse_prediction=True)
        peer_config._attn_implementation = "sdpa"
        peer = peer_of(peer_config, transformers.ModernBertForMaskedLM(peer_config), bench).train()
        for size in [2] if bench.smoke else [16, 32]:
            grids, marks = (x.view(count, length).to(bench.device).split(size) for x in (ids, labels))
            run = step(peer, [{"input_ids": g, "labels": m} for g, m in zip(grids, marks, strict=True)])
            took = bench.seconds(run, 2.0, 2)
            if len(ids) / took > part.get("tokens a second", 0.0):
                part |= {"tokens a second": len(ids) / took, "batch": size, "GiB": bench.memory(run)}

    bench.measure("training step", functools.partial(ours, bench.dtype, False))
    if not bench.smoke:
        bench.measure("training step, float32 weights", functools.partial(ours, torch.float32, True))
    bench.measure("training step, transformers", theirs)


@torch.inference_mode()
def generate(bench: Bench) -> None:
    """Greedy decoding."""
    import transformers

    torch.manual_seed(0)
    ours = modernbert.ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**bench.sizes)).eval()
    peer_config = transformers.ModernBertDecoderConfig(**bench.sizes)
    peer_config._attn_implementation = "sdpa"
    peer = transformers.ModernBertDecoderForCausalLM(peer_config).eval()
    peer.load_state_dict(ours.state_dict(), strict=False)
    ours = ours.to(bench.device, bench.dtype).optimize_for_inference()
    peer = peer_of(peer_config, peer, bench)
    prompt, new = (8, 6) if bench.smoke else (128, 128)

    def fill(batch: int, part: Part) -> None:
        ids = torch.randint(5, bench.sizes["vocab_size"] - 5, (batch, prompt)).to(bench.device)
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        for name, model in (("ours", ours), ("transformers", peer)):
            took = bench.seconds(functools.partial(model.generate, ids, **options), 1.0, 1)
            part[name] = {"tokens a second": batch * new / took, "ms a step": 1e3 * took / new}

    for batch in [2] if bench.smoke else [1, 32]:
        bench.measure(f"generate {batch} x ({prompt} + {new})", functools.partial(fill, batch))


# What runs in a process of its own, in this order, and for how many seconds at the most.
GROUPS: dict[str, tuple[Callable[[Bench], None], int]] = {
    "machine": (machine, 60),
    "encode": (encode, 150),
    "train": (train, 90),
    "generate": (generate, 90),
    "compiled": (compiled, 150),
}


def table(found: dict[str, Part]) -> str:
    """What was found, as Markdown."""
    lines = ["| | tokens/s | share of peak | GiB | transformers, sdpa | times |", "|---|---|---|---|---|---|"]
    for name, part in found.items():
        if not name.startswith("encode ") or "times transformers" not in part:
            continue
        ours, peer = part["ours"], part["transformers, sdpa"]
        lines.append(
            f"| {name[7:]} | {ours['tokens a second']:,.0f} | {ours['share of peak']:.0%} | {ours['GiB']:.1f} | "
            f"{peer['tokens a second']:,.0f} | {part['times transformers']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="where to measure")
    parser.add_argument("--seconds", type=float, default=465, help="of the whole run")
    parser.add_argument("--out", type=Path, help="a JSON file for what was found")
    parser.add_argument("--smoke", action="store_true", help="small models, to see that everything runs")
    parser.add_argument("--groups", default=",".join(GROUPS), help="what to run, of " + ", ".join(GROUPS))
    parser.add_argument("--here", action="store_true", help="in this process, going on with what --out holds")
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --smoke --device cpu shows that the code runs")
    groups = given.groups.split(",")
    if unknown := set(groups) - set(GROUPS):
        parser.error(f"there are no groups {', '.join(unknown)}; choose of {', '.join(GROUPS)}")
    out = given.out or Path(tempfile.mkdtemp()) / "gpu.json"
    if given.here:
        device = torch.device("cuda", device.index or 0) if device.type == "cuda" else device
        found = json.loads(out.read_text()) if out.exists() else {}
        for group in groups:
            GROUPS[group][0](Bench(device, given.smoke, out, found))
        return
    out.unlink(missing_ok=True)
    until, ended = time.monotonic() + given.seconds, {}
    for group in groups:
        limit = min(GROUPS[group][1], until - time.monotonic())
        command = [sys.executable, __file__, "--here", "--groups", group, "--device", given.device, "--out", str(out)]
        try:
            done = subprocess.run([*command, *["--smoke"] * given.smoke], timeout=max(limit, 1), check=False)
            ended[group] = f"exit {done.returncode}"
        except subprocess.TimeoutExpired:
            ended[group] = f"ended after {limit:.0f} s"
    found = json.loads(out.read_text()) if out.exists() else {}
    _write(out, {**found, "processes": ended})
    print(json.dumps(ended))
    print(table(found))


if __name__ == "__main__":
    main()
