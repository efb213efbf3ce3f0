"""Pipelines on a stream of short texts: tokens a second and memory, compared with the bare model and other libraries.

    pip install -c constraints.txt -e '.[dev]'
    python benchmarks/pipelines.py texts.csv --column text --texts 20000
    python benchmarks/pipelines.py texts.csv --size base --texts 1000

Contenders, each in a process of its own, in interleaved rounds, the best round of each:

- bare: the model alone on ideal batches: tokenized before, sorted over all texts, packed to the same token budget;
- pipeline: ours, from a generator, tokenizing included;
- transformers-N (text-classification): its pipeline with batches of N texts;
- sentence-transformers-N (sentence-embedding): its `encode` with batches of N texts, sorted by itself.

All compute in float32 on random weights of one checkpoint. Only real tokens count. Memory is the process's, after a
fifth of the texts and at the end: what a stream costs is the difference.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = {
    "small": {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    "base": {},
}
PEERS = {"text-classification": "transformers", "sentence-embedding": "sentence-transformers"}


def make_checkpoints(folder, size, tokenizer):
    """Random weights of a size, as a classifier and as a bare encoder."""
    import torch

    from modernbert import ModernBertConfig, ModernBertForSequenceClassification, Tokenizer

    special = {f"{n}_token": f"[{n.upper()}]" for n in ("cls", "sep", "pad", "mask", "unk")}
    tokens = Tokenizer.from_pretrained(tokenizer, model_max_length=512, **special)
    ids = {f"{n}_token_id": tokens.convert_tokens_to_ids(f"[{n.upper()}]") for n in ("cls", "sep", "pad")}
    config = ModernBertConfig(vocab_size=len(tokens), max_position_embeddings=512, **ids, **SIZES[size])
    torch.manual_seed(0)
    model = ModernBertForSequenceClassification(config)
    for name, part in (("text-classification", model), ("sentence-embedding", model.model)):
        part.save_pretrained(folder / name)
        tokens.save_pretrained(folder / name)


def read_texts(file, column, count):
    """This many texts of a file; where it has fewer, they repeat."""
    from modernbert.io.tables import read_records

    texts = [record[column] for record in read_records(Path(file))]
    return [texts[i % len(texts)] for i in range(count)]


def resident():
    """Bytes of memory that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def work(contender, task, folder, texts):
    """Run one contender over all texts."""
    import torch

    from modernbert import Tokenizer

    tokenizer = Tokenizer.from_pretrained(folder)
    rows = [e.ids for e in tokenizer(texts).encodings]
    tokens = sum(map(len, rows))
    name, _, batch = contender.rpartition("-")
    if contender in ("bare", "pipeline"):
        from modernbert import pipeline

        serve = pipeline(task, folder, dtype="float32")
        source = (text for text in texts)
        answers = serve.stream(source) if contender == "pipeline" else bare(serve, rows)
    elif name == "transformers":
        import transformers

        serve = transformers.pipeline(task, model=folder, dtype=torch.float32)
        answers = serve((text for text in texts), batch_size=int(batch))
    else:
        from sentence_transformers import SentenceTransformer

        serve = SentenceTransformer(folder, device="cpu")
        answers = (vector for some in [texts] for vector in serve.encode(some, batch_size=int(batch)))
    start, early = time.perf_counter(), 0
    for done, _ in enumerate(answers, 1):
        if not early and done >= len(texts) // 5:
            early = resident()
    seconds = time.perf_counter() - start
    return {"tokens": tokens, "seconds": seconds, "early": early, "late": resident()}


def bare(serve, rows):
    """The model alone on packed batches of texts of like length."""
    import torch

    model = serve.model.model if hasattr(serve.model, "settings") else serve.model
    rows = sorted(rows, key=len, reverse=True)
    while rows:
        batch, size = [], 0
        while rows and size + len(rows[-1]) <= serve.batch_tokens:
            size += len(rows[-1])
            batch.append(rows.pop())
        ids = torch.tensor([i for row in batch for i in row])
        cu_seqlens = torch.tensor([0, *map(len, batch)]).cumsum(0)
        with torch.inference_mode():
            model(ids, cu_seqlens=cu_seqlens)
        yield from batch


def main():
    """Read the options, run the contenders in turn, print a table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("file", help="texts: .csv, .jsonl, .txt, .parquet")
    options.add_argument("--column", default="text")
    options.add_argument("--texts", type=int, default=20000)
    options.add_argument("--size", choices=SIZES, default="small")
    options.add_argument("--tokenizer", default=None, help="folder; the package's small one if not given")
    options.add_argument("--batches", default="8,32,128", help="texts a batch of the peers")
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--json", help="file to write the measurements to")
    options.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    given = options.parse_args()
    texts = read_texts(given.file, given.column, given.texts)
    if given.worker:
        contender, task, folder = given.worker
        print(json.dumps(work(contender, task, folder, texts)))
        return
    from modernbert.pipelines import small_model

    found = {}
    with tempfile.TemporaryDirectory() as root:
        make_checkpoints(Path(root), given.size, given.tokenizer or small_model())
        for _ in range(given.rounds):
            for task, peer in PEERS.items():
                for contender in ("bare", "pipeline", *(f"{peer}-{n}" for n in given.batches.split(","))):
                    command = [sys.executable, __file__, given.file, "--column", given.column]
                    command += ["--texts", str(given.texts), "--worker", contender, task, str(Path(root) / task)]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    new = json.loads(done.stdout.splitlines()[-1])
                    best = found.setdefault(task, {}).get(contender)
                    if best is None or new["seconds"] < best["seconds"]:
                        found[task][contender] = new
    for task, results in found.items():
        ours = results["pipeline"]["seconds"]
        print(f"\n{task}, {given.size} size, {given.texts} texts, {results['pipeline']['tokens']} real tokens")
        for contender, result in results.items():
            rate = result["tokens"] / result["seconds"]
            grown = (result["late"] - result["early"]) / 2**20
            memory = f", {grown:+.0f} MiB from a fifth of the texts to the end" if result["early"] else ""
            print(f"  {contender:25} {rate:9,.0f} tokens/s  {result['seconds'] / ours:5.2f} x pipeline's time{memory}")
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
