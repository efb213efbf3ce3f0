"""Speed of generation, with float and quantized weights, compared with transformers and with reading the weights once.

    python benchmarks/decode.py --dtype float32 --rounds 2
    python benchmarks/decode.py --dtype bfloat16 --workloads 1x32+64 --contenders modernbert,modernbert-int8

A random base-size decoder. Each contender runs in a process of its own, one after another; the best round counts. The
time of a step is that of N + 1 tokens less that of one, over N. The limit is the time that this machine takes to read
the weights once, at the bandwidth of summing a tensor larger than its caches.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONTENDERS = ("modernbert", "transformers")
SCHEMES = ("int8", "int8-weight-only", "int4", "int4-weight-only")
WORKLOADS = ("1x32+64", "8x32+64", "1x2048+32")


def checkpoint(folder: Path) -> None:
    """Make the decoder if it does not exist yet."""
    import torch

    from modernbert import ModernBertDecoderConfig, ModernBertDecoderForCausalLM

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = ModernBertDecoderConfig(local_rope_theta=10_000.0)
        ModernBertDecoderForCausalLM(config).save_pretrained(folder)


def measure(contender: str, workload: str, dtype: str, folder: Path, threads: int) -> dict[str, float]:
    """Milliseconds of a step and of the prompt, in this process."""
    import torch

    torch.set_num_threads(threads)
    shape, new = workload.split("+")
    texts, prompt = map(int, shape.split("x"))
    if contender.startswith("modernbert"):
        from modernbert import ModernBertDecoderForCausalLM

        scheme = contender.partition("-")[2] or None
        model = ModernBertDecoderForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=scheme)
        model.optimize_for_inference()
    else:
        from transformers import ModernBertDecoderForCausalLM as Theirs

        model = Theirs.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    ids = torch.randint(5, 50_000, (texts, prompt), generator=torch.Generator().manual_seed(0))

    def generate(tokens: int) -> float:
        start = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
        return time.perf_counter() - start

    generate(2)
    first = min(generate(1) for _ in range(2))
    seconds = min(generate(int(new) + 1) for _ in range(2)) - first
    return {"step": seconds / int(new) * 1e3, "prompt": first * 1e3}


def read_milliseconds(dtype: str, threads: int) -> float:
    """Reading all weights once."""
    import torch

    from modernbert import ModernBertDecoderConfig, ModernBertDecoderForCausalLM

    torch.set_num_threads(threads)
    with torch.device("meta"):
        numbers = ModernBertDecoderForCausalLM(ModernBertDecoderConfig()).num_parameters()
    size = numbers * getattr(torch, dtype).itemsize
    block = torch.ones(2**27)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - start)
    return size / (block.nbytes / min(times)) * 1e3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    known = ["modernbert", *(f"modernbert-{scheme}" for scheme in SCHEMES), "transformers"]
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help=f"the first is compared: {', '.join(known)}")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="TEXTSxPROMPT+NEW, with commas between")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "modernbert-decode")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one, args.dtype, args.folder, args.threads)))
        return
    contenders = args.contenders.split(",")
    if unknown := [name for name in contenders if name not in known]:
        parser.error(f"--contenders has {unknown[0]!r}; choose among {', '.join(known)}")
    checkpoint(args.folder)
    limit = read_milliseconds(args.dtype, args.threads)
    print(f"{args.dtype}: reading the weights once takes {limit:.1f} ms here")
    for workload in args.workloads.split(","):
        best: dict[str, dict[str, float]] = {}
        for _ in range(args.rounds):
            for contender in contenders:
                command = [sys.executable, __file__, "--dtype", args.dtype, "--threads", str(args.threads)]
                command += ["--folder", str(args.folder), "--one", contender, workload]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                new = json.loads(out.strip().splitlines()[-1])
                old = best.get(contender)
                best[contender] = new if old is None else {k: min(v, old[k]) for k, v in new.items()}
        ours = best[contenders[0]]
        others = "".join(
            f", {name} {of['step']:.1f} ms ({of['step'] / ours['step']:.2f} times)"
            for name, of in best.items()
            if name != contenders[0]
        )
        prompts = ", ".join(f"{of['prompt']:.0f}" for of in best.values())
        print(
            f"{workload:10s} step {ours['step']:6.1f} ms, {ours['step'] / limit:.2f} times the limit{others}; "
            f"prompt {prompts} ms",
            flush=True,
        )


if __name__ == "__main__":
    main()
