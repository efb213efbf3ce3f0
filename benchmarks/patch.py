"""Speed of patched objects of transformers and sentence-transformers, compared with the same objects unpatched.

    pip install transformers sentence-transformers && python benchmarks/patch.py --save

A base-size model with random weights, and texts of mixed lengths: pieces of ../shared/data/text, and made-up words
where that is missing. Unpatched and patched run in one process, in turns; the best round counts. The batch size of
either object is its own best of `--batch-sizes` on the first texts. Models of transformers get
batches in the order of the texts, as callers write them; `encode` and `predict` sort, as they always do. The answers
are compared, and so are those of before and after. `--save` writes benchmarks/patch.json.
"""

import argparse
import json
import logging
import os
import platform
import re
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

import modernbert
from modernbert.pipelines import small_model

RESULTS = Path(__file__).with_name("patch.json")
DATA = Path(__file__).parents[2] / "shared" / "data"
SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4},
    "small": {"hidden_size": 384, "intermediate_size": 576, "num_hidden_layers": 10, "num_attention_heads": 6},
    "base": {},
}
HEADS = {"masked": "MaskedLM", "sequence": "SequenceClassification", "token": "TokenClassification"}


def mixed_texts(count, longest):
    """Texts of 6 words up to `longest`, evenly spread over the logarithm of the length."""
    generator = np.random.default_rng(0)
    source = DATA / "text" / "wikitext2-valid.txt"
    if source.exists():
        words = re.sub(r"\s+", " ", source.read_text()).split(" ")
    else:
        words = [f"word{i}" for i in generator.integers(0, 3000, 100_000)]
    sizes = np.exp(generator.uniform(np.log(6), np.log(longest), count)).astype(int)
    starts = generator.integers(0, len(words) - longest, count)
    return [" ".join(words[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


def folder_of(size):
    """A checkpoint with random weights, and a tokenizer: the real one where it is there."""
    path = tempfile.mkdtemp()
    torch.manual_seed(0)
    tokenizer = modernbert.AutoTokenizer.from_pretrained(small_model())
    if (DATA / "tokenizer" / "tokenizer.json").exists():
        tokenizer = modernbert.AutoTokenizer.from_pretrained(DATA / "tokenizer")
    tokenizer.save_pretrained(path)
    modernbert.ModernBertForMaskedLM(modernbert.ModernBertConfig(**SIZES[size])).save_pretrained(path)
    return path


def task_of(name, path, dtype):
    """An object, and what runs it over texts in batches of a size."""
    import sentence_transformers
    import transformers

    kwargs = {"device": "cpu", "model_kwargs": {"dtype": dtype}}
    if name == "encode":
        encoder = sentence_transformers.SentenceTransformer(path, **kwargs)
        return encoder, lambda texts, size: encoder.encode(texts, batch_size=size, convert_to_tensor=True).float()
    if name == "predict":
        ranker = sentence_transformers.CrossEncoder(path, num_labels=1, **kwargs)
        first = "what is it about"
        return ranker, lambda texts, size: ranker.predict([(first, t) for t in texts], batch_size=size)
    torch.manual_seed(0)
    model = getattr(transformers, f"ModernBertFor{HEADS[name]}").from_pretrained(path, dtype=dtype).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    @torch.inference_mode()
    def run(texts, size):
        found = []
        for start in range(0, len(texts), size):
            batch = tokenizer(texts[start : start + size], padding=True, truncation=True, return_tensors="pt")
            logits = model(**batch).logits
            if name == "sequence":
                found.append(logits.float())
            else:  # some of the vocabulary is enough to compare
                found.append(logits[..., ::97][batch["attention_mask"].bool()].float())
        return torch.cat(found)

    return model, run


def seconds(run, texts, size):
    began = time.perf_counter()
    answer = run(texts, size)
    return time.perf_counter() - began, torch.as_tensor(answer)


def measure(name, dtype, path, texts, options):
    """A row of the table."""
    thing, run = task_of(name, path, getattr(torch, dtype))
    pilot, tried, sizes, best, answers = texts[: options.pilot], {}, {}, {}, {}
    for turn in range(options.rounds):
        for patched in (False, True):
            if patched:
                modernbert.patch(thing)
            run(texts[:2], 2)
            if turn == 0:
                tried[patched] = {size: seconds(run, pilot, size)[0] for size in options.batch_sizes}
                sizes[patched] = min(tried[patched], key=tried[patched].get)
            took, answers[patched] = seconds(run, texts, sizes[patched])
            best[patched] = min(best.get(patched, took), took)
            if patched:
                modernbert.unpatch(thing)
    size = sizes[False]
    same_bits = torch.equal(seconds(run, pilot, size)[1], seconds(run, pilot, size)[1])
    again = seconds(run, texts, size)[1] if options.check_bits else answers[False]
    return {
        "task": name,
        "dtype": dtype,
        "unpatched": round(best[False], 3),
        "batch_size": size,
        "tried": {str(n): round(s, 3) for n, s in tried[False].items()},
        "patched": round(best[True], 3),
        "patched_batch_size": sizes[True],
        "speedup": round(best[False] / best[True], 2),
        "largest_difference": float((answers[False] - answers[True]).abs().max()),
        "unpatched_again_same_bits": bool(same_bits and torch.equal(again, answers[False])),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--longest", type=int, default=380, help="words of the longest text")
    parser.add_argument("--pilot", type=int, default=64, help="texts that the best batch size is found with")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tasks", nargs="+", default=["encode", "predict", *HEADS])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--check-bits", action="store_true", help="run once more over all texts at the end")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for quiet in ("transformers", "sentence_transformers"):
        logging.getLogger(quiet).setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    texts, path = mixed_texts(options.texts, options.longest), folder_of(options.size)
    tokens = sum(map(len, modernbert.AutoTokenizer.from_pretrained(path)(texts)["input_ids"]))
    print(f"{len(texts)} texts, {tokens:,} tokens, {options.size} size, {options.threads} threads")
    rows = []
    for dtype in options.dtypes:
        for name in options.tasks:
            rows.append(row := measure(name, dtype, path, texts, options))
            print(
                f"{name:<9} {dtype:<9} unpatched {row['unpatched']:>8.2f} s (batches of {row['batch_size']})  patched "
                f"{row['patched']:>8.2f} s ({row['patched_batch_size']})  {row['speedup']:>5.2f} times  difference "
                f"{row['largest_difference']:.0e}  bits of before: {row['unpatched_again_same_bits']}",
                flush=True,
            )
    if options.save:
        about = {"texts": len(texts), "tokens": tokens, "size": options.size, "threads": options.threads}
        about |= {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        RESULTS.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
