"""Speed of exported graphs, compared with optimum's export of transformers' ModernBERT: padded, with dense masks.

    pip install 'modernbert[export]' && python benchmarks/export.py --optimum /path/to/python --rounds 2

A random encoder, the same weights for all, on the CPU in float32. `--optimum` is the Python of an environment with
optimum-onnx and the transformers that it takes (`pip install 'optimum-onnx[onnxruntime]'`); without it our graphs are
compared with each other. Each contender runs in a process of its own, one after another, in rounds; the best counts.
`--clock cpu` counts the processor's time instead of the wall's, with one thread, for a machine that others use.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FILES = {
    "packed, ONNX Runtime": "ours/onnx/model_packed.onnx",
    "padded, ONNX Runtime": "ours/onnx/model.onnx",
    "optimum, ONNX Runtime": "optimum/model.onnx",
    "packed, OpenVINO": "ours/openvino/openvino_model_packed.xml",
    "padded, OpenVINO": "ours/openvino/openvino_model.xml",
    "optimum, OpenVINO": "optimum/model.onnx",
    "packed int8, ONNX Runtime": "ours/onnx/model_packed_quantized.onnx",
}
SIZES = {"base": {}, "small": {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2}}


def prepare(folder, size, optimum):
    """Write the graphs that are not there yet."""
    import torch

    import modernbert

    checkpoint = folder / "checkpoint"
    if not (checkpoint / "config.json").exists():
        torch.manual_seed(0)
        modernbert.ModernBertModel(modernbert.ModernBertConfig(**SIZES[size])).save_pretrained(checkpoint)
    if not (folder / "ours").exists():
        options = {"format": ["onnx", "openvino"], "graph": ["padded", "packed"], "int8": True, "min_cosine": 0.9}
        print(modernbert.export(checkpoint, folder / "ours", longest=512, **options), flush=True)
    if optimum is not None and not (folder / "optimum").exists():
        made = "from optimum.exporters.onnx import main_export; import sys; "
        made += "main_export(sys.argv[1], sys.argv[2], task='feature-extraction', opset=18)"
        without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [optimum, "-c", made, str(checkpoint), str(folder / "optimum")]
        subprocess.run(command, check=True, env=without, capture_output=True)


def run(contender, workload, folder, threads, repeats, clock):
    """Seconds and peak memory of one contender, in this process."""
    import numpy as np

    from modernbert.tools.bench import lengths_of

    lengths, random = lengths_of(workload), np.random.default_rng(0)
    rows = [random.integers(5, 50_000, length) for length in lengths]
    if contender.startswith("packed"):
        feed = {"input_ids": np.concatenate(rows), "cu_seqlens": np.cumsum([0, *lengths])}
    else:
        feed = {name: np.zeros((len(rows), max(lengths)), dtype=np.int64) for name in ("input_ids", "attention_mask")}
        for i, row in enumerate(rows):
            feed["input_ids"][i, : len(row)], feed["attention_mask"][i, : len(row)] = row, 1
    path = str(folder / FILES[contender])
    if contender.endswith("OpenVINO"):
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        compiled = openvino.Core().compile_model(path, "CPU", settings)

        def forward():
            return next(iter(compiled(feed).values()))
    else:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def forward():
            return session.run(None, feed)[0]

    now = time.perf_counter if clock == "wall" else time.process_time
    out, times = forward(), []
    for _ in range(repeats):
        start = now()
        out = forward()
        times.append(now() - start)
    last = out[lengths[0] - 1] if out.ndim == 2 else out[0, lengths[0] - 1]
    # Of this program alone; getrusage counts what its parent held when it started this one.
    status = Path("/proc/self/status").read_text()
    peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    broken = not np.isfinite(out).all()
    return {"seconds": min(times), "peak_kib": peak, "print": last[:64].tolist(), "broken": bool(broken)}


def main():
    """Run all, and print the table."""
    import numpy as np

    from modernbert.tools.bench import lengths_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=list(SIZES))
    parser.add_argument("--optimum", help="Python of an environment with optimum-onnx")
    parser.add_argument("--workloads", default="var32,1x16,8x128,1x2048")
    parser.add_argument("--contenders", default=";".join(FILES), help="separated by semicolons")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    threads = 1 if options.clock == "cpu" else options.threads
    folder = options.folder or Path(tempfile.gettempdir()) / "modernbert-benchmarks" / f"export-{options.size}"
    if options.one:
        print("RESULT " + json.dumps(run(*options.one, folder, threads, options.repeats, options.clock)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, options.size, options.optimum)
    contenders = [name for name in options.contenders.split(";") if (folder / FILES[name]).exists()]
    print(f"{'batch':8s} {'contender':26s} {'ms':>10s} {'tokens/s':>9s} {'ratio':>6s} {'MiB':>6s}  cosine")
    for workload in options.workloads.split(","):
        best = {}
        for _ in range(options.rounds):
            for contender in contenders:
                command = [
                    sys.executable,
                    __file__,
                    "--size",
                    options.size,
                    "--threads",
                    str(threads),
                    "--folder",
                    folder,
                ]
                command += ["--clock", options.clock, "--repeats", str(options.repeats), "--one", contender, workload]
                done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
                line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
                if line is None:
                    print(f"{contender} {workload} failed: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
                    continue
                new = json.loads(line[7:])
                if contender not in best or new["seconds"] < best[contender]["seconds"]:
                    best[contender] = new
        first = next(iter(best.values()))
        for contender, cell in best.items():
            a, b = np.array(cell["print"]), np.array(first["print"])
            cosine = "NaN" if cell["broken"] else f"{a @ b / np.linalg.norm(a) / np.linalg.norm(b):.5f}"
            print(
                f"{workload:8s} {contender:26s} {cell['seconds'] * 1e3:10.1f} "
                f"{sum(lengths_of(workload)) / cell['seconds']:9.0f} {cell['seconds'] / first['seconds']:6.2f} "
                f"{cell['peak_kib'] / 1024:6.0f}  {cosine}",
                flush=True,
            )


if __name__ == "__main__":
    main()
