"""Speed of the encoder, compared with transformers, OpenVINO and the time that the arithmetic alone takes.

    pip install openvino transformers && python benchmarks/encoder.py --dtype float32 --rounds 2

A random base-size encoder, the same weights for all. Each contender runs in a process of its own, one after another, in
rounds; the best round counts. Only real tokens count. `--save` writes benchmarks/results.json, which picture.py draws.
The limit is that of `modernbert bench`: useful work at the speed of the fastest matrix product, or reading the weights.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONTENDERS = ("modernbert", "transformers", "openvino")
RESULTS = Path(__file__).with_name("results.json")


def checkpoint(folder):
    """Make the encoder if it does not exist yet."""
    import torch

    from modernbert import ModernBertConfig, ModernBertModel

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        ModernBertModel(ModernBertConfig()).save_pretrained(folder)


def forward_of(contender, dtype, folder, threads):
    """A function of padded ids and mask to the last hidden state."""
    import torch

    torch.set_num_threads(threads)
    if contender == "modernbert":
        from modernbert import ModernBertModel

        model = ModernBertModel.from_pretrained(folder, dtype=dtype).optimize_for_inference()
        return lambda ids, mask: model(ids, attention_mask=mask).last_hidden_state
    from transformers import ModernBertModel as Theirs

    model = Theirs.from_pretrained(folder, dtype=dtype if contender == "transformers" else "float32").eval()
    if contender == "transformers":
        return lambda ids, mask: model(input_ids=ids, attention_mask=mask).last_hidden_state
    import openvino

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    path = folder / "openvino.xml"
    if not path.exists():
        mask = torch.ones(2, 64, dtype=torch.int64)
        mask[1, 40:] = 0
        with torch.no_grad():
            converted = openvino.convert_model(
                Plain(), example_input={"input_ids": torch.full((2, 64), 7), "attention_mask": mask}
            )
        openvino.save_model(converted, path, compress_to_fp16=False)
    settings = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda ids, mask: torch.from_numpy(request.infer([ids.numpy(), mask.numpy()])[0])


def run(contender, workload, dtype, folder, threads, repeats):
    """Seconds and peak memory of one contender, in this process."""
    import torch

    from modernbert.tools.bench import lengths_of

    lengths = lengths_of(workload)
    ids = torch.full((len(lengths), max(lengths)), 50283)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    generator = torch.Generator().manual_seed(0)
    ids[mask == 1] = torch.randint(5, 50_000, (sum(lengths),), generator=generator)
    forward = forward_of(contender, dtype, folder, threads)
    times = []
    with torch.inference_mode():
        out = forward(ids, mask)
        for _ in range(repeats):
            start = time.perf_counter()
            out = forward(ids, mask)
            times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": min(times), "peak_kib": peak, "print": out[0, lengths[0] - 1, :64].float().tolist()}


def main():
    """Run all, print the table, and save it with `--save`."""
    import torch

    from modernbert import ModernBertConfig
    from modernbert.tools.bench import lengths_of, limits, useful_flops

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--workloads", default="1x16,8x128,4x512,var32,1x2048,1x8192")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "modernbert-benchmarks" / "encoder"
    )
    parser.add_argument("--save", action="store_true", help="write benchmarks/results.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(
            "RESULT " + json.dumps(run(*options.one, options.dtype, options.folder, options.threads, options.repeats))
        )
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    checkpoint(options.folder)
    torch.set_num_threads(options.threads)
    machine = limits(getattr(torch, options.dtype))
    contenders, workloads = options.contenders.split(","), options.workloads.split(",")
    table = {workload: {} for workload in workloads}
    for workload in workloads:
        for _ in range(options.rounds):
            for contender in contenders:
                command = [sys.executable, __file__, "--dtype", options.dtype, "--threads", str(options.threads)]
                command += ["--folder", str(options.folder), "--repeats", str(options.repeats)]
                environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
                done = subprocess.run(
                    [*command, "--one", contender, workload], capture_output=True, text=True, env=environment
                )
                line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
                if line is None:
                    print(f"{contender} {workload} failed: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
                    continue
                new = json.loads(line[7:])
                old = table[workload].get(contender)
                if old is None or new["seconds"] < old["seconds"]:
                    table[workload][contender] = new
    print(f"{options.dtype}, {options.threads} threads; products {machine.flops / 1e9:.0f} GFLOP/s by {machine.by}")
    print(
        f"{'batch':8s} {'contender':14s} {'ms':>10s} {'tokens/s':>9s} {'ratio':>6s} {'MiB':>6s} {'limit':>6s}  cosine"
    )
    for workload, row in table.items():
        lengths = lengths_of(workload)
        flops, first = useful_flops(ModernBertConfig(), lengths), next(iter(row.values()))
        for contender, cell in row.items():
            cell["limit"] = flops / machine.flops
            prints = torch.tensor([cell["print"], first["print"]])
            cosine = float(torch.cosine_similarity(prints[0], prints[1], dim=0))
            print(
                f"{workload:8s} {contender:14s} {cell['seconds'] * 1e3:10.1f} {sum(lengths) / cell['seconds']:9.0f} "
                f"{cell['seconds'] / first['seconds']:6.2f} {cell['peak_kib'] / 1024:6.0f} "
                f"{cell['limit'] / cell['seconds']:6.0%}  {cosine:.5f}"
            )
        for cell in row.values():
            del cell["print"]
    if options.save:
        saved = {
            "dtype": options.dtype,
            "threads": options.threads,
            "processor": platform.processor() or platform.machine(),
            "gflops": machine.flops / 1e9,
            "tokens": {workload: sum(lengths_of(workload)) for workload in workloads},
            "workloads": table,
        }
        RESULTS.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
