"""How soon a model of base size answers: from the start of a process, one text, and quantized while it is loaded.

    python benchmarks/ready.py start --tokenizer ../shared/data/tokenizer
    python benchmarks/ready.py query --tokenizer ../shared/data/tokenizer
    python benchmarks/ready.py quantize --tokenizer ../shared/data/tokenizer --schemes int8 int4

Weights are random, and three channels of each norm are fifty times as large as the others, as trained models have them.
Processes are new for each number; the files are in the system's cache.

- start: seconds from the beginning of a process to the first vector of a pipeline on a folder, beyond `import torch`
  alone, which is measured in turn; the least and the median of the rounds.
- query: milliseconds of a call with one text, and of the model's own pass over the same ids; medians of 200.
- quantize: seconds of `quantization_config=` while the folder is loaded, beyond loading it as it is, and the cosine
  that was measured.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEXT = "The committee will meet again on Thursday to decide whether the bridge is to be closed over the winter."
CHANNELS = (7, 311, 560)

START = """
import sys
if sys.argv[1] == "torch":
    import torch
else:
    from modernbert import pipeline
    vector = pipeline("sentence-embedding", sys.argv[1])(sys.argv[2])
    assert vector.shape == (768,)
"""


def make(folder, tokenizer, dtype, layers=22):
    """A folder of base size with random weights."""
    import torch

    from modernbert import ModernBertConfig, ModernBertModel, Tokenizer

    special = {f"{n}_token": f"[{n.upper()}]" for n in ("cls", "sep", "pad", "mask", "unk")}
    tokens = Tokenizer.from_pretrained(tokenizer, model_max_length=8192, **special)
    torch.manual_seed(0)
    model = ModernBertModel(ModernBertConfig(num_hidden_layers=layers))
    with torch.no_grad():
        channels = [c % model.config.hidden_size for c in CHANNELS]
        for layer in model.layers:
            for norm in (layer.attn_norm, layer.mlp_norm):
                if hasattr(norm, "weight"):
                    norm.weight[channels] *= 50
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokens.save_pretrained(folder)


def seconds(*arguments):
    """Of a process that does one thing."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", START, *arguments], check=True)
    return time.perf_counter() - begin


def start(folder, rounds):
    """Rounds of importing torch and of a first vector, in turn."""
    seconds(str(folder), TEXT)  # bytecode and files
    pairs = [(seconds("torch"), seconds(str(folder), TEXT)) for _ in range(rounds)]
    beyond = [vector - torch for torch, vector in pairs]
    return {"torch": min(a for a, _ in pairs), "beyond": min(beyond), "beyond_median": statistics.median(beyond)}


def query(folder):
    """Medians of a call and of the model's pass, in turn."""
    import torch

    from modernbert import pipeline
    from modernbert.nn.packing import PackedInputs

    embed = pipeline("sentence-embedding", folder)
    ids = embed.tokenizer(TEXT).input_ids
    inputs = PackedInputs.of_rows([ids])
    model = embed.model.model
    whole, alone = [], []
    with torch.inference_mode():
        for _ in range(220):
            begin = time.perf_counter()
            embed(TEXT)
            middle = time.perf_counter()
            model.encode(inputs)
            whole.append(middle - begin)
            alone.append(time.perf_counter() - middle)
    call, own = (1000 * statistics.median(times[20:]) for times in (whole, alone))
    return {"tokens": len(ids), "call_ms": call, "model_ms": own, "around_ms": call - own}


def quantize(folder, scheme):
    """Seconds of loading as it is and quantized, in this process."""
    from modernbert import ModernBertModel

    times = []
    for how in (None, scheme):
        begin = time.perf_counter()
        model = ModernBertModel.from_pretrained(folder, quantization_config=how)
        times.append(time.perf_counter() - begin)
    measured = model.quantization.measured
    return {
        "scheme": scheme,
        "seconds": times[1] - times[0],
        "cosine_min": measured["cosine_min"],
        "cosine_mean": measured["cosine_mean"],
        "finer": len(model.quantization.finer),
    }


def main():
    """Read the options, make the folder, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("start", "query", "quantize"))
    parser.add_argument("--tokenizer", help="folder with a tokenizer.json; by default that of the small encoder")
    parser.add_argument("--folder", type=Path, help="a folder that holds a model already, or where one is to be made")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--schemes", nargs="+", default=["int8", "int4"])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.tokenizer is None:
        from modernbert.pipelines import small_model

        given.tokenizer = small_model()
    with tempfile.TemporaryDirectory() as temporary:
        for dtype in given.dtypes if given.what != "quantize" else ["float32"]:
            folder = (given.folder or Path(temporary)) / dtype
            if not (folder / "config.json").exists():
                make(folder, given.tokenizer, dtype, given.layers)
            if given.what == "quantize":
                rows = (quantize(folder, scheme) for scheme in given.schemes)
            else:
                rows = iter([start(folder, given.rounds) if given.what == "start" else query(folder)])
            for row in rows:
                print(json.dumps({"dtype": dtype, **row}), flush=True)


if __name__ == "__main__":
    main()
