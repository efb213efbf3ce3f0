"""Short texts and single tokens beside what bounds them: reading the weights once, or multiplying them.

    pip install -c constraints.txt -e '.[dev]'
    python benchmarks/latency.py                                   # float32 and bfloat16
    python benchmarks/latency.py --kinds int8,int4 --work 1x16,decode
    python benchmarks/latency.py --kinds bfloat16 --work 1x16,8x128 --parts

Models are of base size with random weights; those of 8 and 4 bits are quantized once (a minute) and kept in `--keep`.
Work is NxL, N texts of L tokens, or `decode`, a greedy token after a prompt of 64. Times are the best and the median of
passes during `--seconds`, with Python around the kernels; the limit is the time of reading the weights of the layers
(and of a decoder's head) once at the speed that a sum over 256 MB reads with, or of their products at the speed of the
fastest product that was seen here, whichever is longer.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from modernbert import (
    ModernBertConfig,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    ModernBertModel,
    QuantizationConfig,
    Tokenizer,
    quantize,
)
from modernbert.nn.packing import PackedInputs
from modernbert.pipelines import small_model
from modernbert.tools.bench import limits

BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 32}
CLASSES = {
    "encoder": (ModernBertModel, ModernBertConfig),
    "decoder": (ModernBertDecoderForCausalLM, ModernBertDecoderConfig),
}


def made(kind, architecture, keep):
    """An optimized model of base size."""
    cls, config = CLASSES[architecture]
    torch.manual_seed(0)
    if kind in ("float32", "bfloat16"):
        return cls(config()).to(getattr(torch, kind)).eval().optimize_for_inference()
    folder = keep / f"{architecture}-{kind}"
    if not folder.is_dir():
        model, tokenizer = cls(config()).eval(), Tokenizer.from_pretrained(small_model(architecture))
        quantize(model, QuantizationConfig(scheme=kind, min_cosine=0.1), tokenizer=tokenizer)
        model.save_pretrained(folder)
    return cls.from_pretrained(folder, dtype="bfloat16").eval().optimize_for_inference()


def timed(run, seconds):
    """The best and the median seconds of a call."""
    run()
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < 3:
        begun = time.perf_counter()
        run()
        found.append(time.perf_counter() - begun)
    return min(found), sorted(found)[len(found) // 2]


def token_seconds(model, steps=48):
    """Of a token after the first one: the best and the median of some runs."""
    ids = torch.randint(5, 2000, (1, 64))

    def run(tokens):
        begun = time.perf_counter()
        model.generate(ids, max_new_tokens=tokens, eos_token_id=-1, do_sample=False)
        return time.perf_counter() - begun

    run(2)
    found = sorted((run(1 + steps) - run(1)) / steps for _ in range(5))
    return found[0], found[2]


def weights_of(config, head):
    """How many weights the products of a pass read."""
    inner, width = config.intermediate_size, config.hidden_size
    layers = config.num_hidden_layers * (4 * width * width + 3 * inner * width)
    return layers + (head and (config.vocab_size + width) * width)


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default="float32,bfloat16", help=", ".join(BYTES))
    parser.add_argument("--work", default="1x1,1x16,1x64,8x128,decode")
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--parts", action="store_true", help="show where the time of a pass goes")
    parser.add_argument("--keep", type=Path, default=Path("latency-models"), help="folder of quantized models")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    machine = {name: limits(getattr(torch, name)) for name in ("float32", "bfloat16")}
    reading = max(one.reading for one in machine.values())
    products = {name: machine[name].flops for name in machine}
    print(", ".join(f"{name} {flops / 1e9:.0f} GFLOP/s" for name, flops in products.items()), end="")
    print(f", reading {reading / 1e9:.1f} GB/s")
    results = []
    for kind in arguments.kinds.split(","):
        models = {}
        for work in arguments.work.split(","):
            architecture = "decoder" if work == "decode" else "encoder"
            if architecture not in models:
                models[architecture] = made(kind, architecture, arguments.keep)
            model = models[architecture]
            weights = weights_of(model.config, work == "decode")
            if work == "decode":
                tokens, (best, median) = 1, token_seconds(model)
            else:
                texts, length = map(int, work.split("x"))
                tokens = texts * length
                inputs = PackedInputs.of_rows([torch.randint(5, 2000, (length,)).tolist() for _ in range(texts)])
                best, median = timed(lambda inputs=inputs, model=model: model.encode(inputs), arguments.seconds)
            read = weights * BYTES[kind] / reading
            # Bytes are multiplied twice as fast as pairs of bfloat16 where a processor does both by one instruction.
            peak = products[kind] if kind in products else 2 * products["bfloat16"]
            limit = max(read, 2 * tokens * weights / peak)
            results.append({"kind": kind, "work": work, "best": best, "median": median, "read": read, "limit": limit})
            print(
                f"{kind:<9}{work:<8}{best * 1e3:>8.2f} ms (median {median * 1e3:.2f}), {best / read:.2f} x reading "
                f"({read * 1e3:.2f} ms), {limit / best:.0%} of the limit",
                flush=True,
            )
            if arguments.parts and work != "decode":
                parts = model.runner.layers.time_parts(inputs)
                print("         ", ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in parts.items()))
    if arguments.json:
        found = {"reading": reading, "products": products, "results": results}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
