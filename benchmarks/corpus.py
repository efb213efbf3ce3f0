"""Jobs over corpora: one result whatever ran it, throughput beside the bare pipeline, memory, and a peer.

    pip install -c constraints.txt -e '.[dev]'
    python benchmarks/corpus.py digests --texts 2000           # at length: --texts 100000 --kills 5
    python benchmarks/corpus.py stream --texts 2000            # at length: --texts 1000000 --words 12
    python benchmarks/corpus.py peer --texts 200 --size small  # at length: --texts 20000 --size base --words 200
    python benchmarks/corpus.py stream --engine local --engine ray:actors=2

Texts are random words drawn by Zipf's law, of 1 to 2 x `--words` words, a hundredth of them duplicates. `--size base`
has random weights.

- digests: the SHA-256 over sorted keys and vectors of a pipeline called in this process, of each engine, of another
  shard size, of another order of files, and of a job that is killed (-9) at random moments and run again.
- stream: texts a second of `pipeline.stream` alone and of each engine, each in a process of its own, on the same cores,
  loading not counted; and the memory of every process after its first shard and at the end.
- peer: the same beside `datasets.map` with sentence-transformers, batches of 32 and of 256, the better one counts.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = {"small": None, "base": {}}
HERE = Path(__file__)


def write_texts(folder, count, words, files=4, seed=0, order=None):
    """Files of texts, .jsonl and .txt in turn."""
    import numpy as np

    generator = np.random.default_rng(seed)
    parts = ["ka", "lo", "mi", "ne", "ru", "sta", "ti", "vor", "we", "zen", "dal", "fi"]
    known = ["".join(generator.choice(parts, generator.integers(1, 5))) for _ in range(20_000)]
    chances = 1 / np.arange(1, len(known) + 1)
    drawn = generator.choice(len(known), count * words * 2, p=chances / chances.sum())
    lengths = generator.integers(1, 2 * words + 1, count)
    texts = []
    for i, length in enumerate(lengths):
        start = i * words * 2
        text = " ".join(known[j] for j in drawn[start : start + length])
        texts.append(texts[i // 2] if i % 100 == 99 else f"{text} {i}")
    if order is not None:
        random.Random(order).shuffle(texts)
    folder.mkdir(parents=True)
    for number in range(files):
        some = texts[number::files]
        if number % 2:
            (folder / f"{number}.txt").write_text("\n".join(some) + "\n")
        else:
            (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    return texts


def make_model(folder, size):
    """A checkpoint: the package's small encoder, or random weights of the base size with its tokenizer."""
    from modernbert.pipelines import small_model

    if SIZES[size] is None:
        return str(small_model("encoder"))
    import torch

    from modernbert import AutoConfig, ModernBertConfig, ModernBertModel, Tokenizer

    tokenizer = Tokenizer.from_pretrained(small_model("encoder"))
    ids = {name: getattr(AutoConfig.from_pretrained(small_model("encoder")), name) for name in _IDS}
    torch.manual_seed(0)
    ModernBertModel(ModernBertConfig(vocab_size=len(tokenizer), **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")


def parsed(engine):
    """The name and options of "NAME:OPTION=VALUE,OPTION=VALUE"."""
    name, _, options = engine.partition(":")
    return {"engine": name, "engine_options": [one for one in options.split(",") if one]}


def job(places, output, model, engine, **options):
    """Run a job in a process of its own; its seconds, those of loading left out, and its last metrics."""
    begun = time.monotonic()
    given = json.dumps([str(places), str(output), model, {**parsed(engine), **options}])
    subprocess.run([sys.executable, HERE, "job", given], check=True)
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return time.monotonic() - begun, lines


def killed_job(places, output, model, engine, kills, seed=0):
    """Begin a job and kill it, with all its processes, as often as this; then let it end."""
    chance = random.Random(seed)
    done = 0
    given = json.dumps([str(places), str(output), model, {**parsed(engine), "shard_size": 64}])
    for _ in range(kills):
        shards = len(list(Path(output, "data").glob("part*")))
        process = subprocess.Popen([sys.executable, HERE, "job", given], start_new_session=True)
        wanted = shards + chance.randint(1, 5)
        while process.poll() is None and len(list(Path(output, "data").glob("part*"))) < wanted:
            time.sleep(0.01)
        if process.poll() is None:
            time.sleep(chance.random() / 20)
            process.kill()
        done += process.wait() == -signal.SIGKILL
    job(places, output, model, engine)
    return done


def digests(arguments, folder):
    import pyarrow as pa

    from modernbert import corpus, pipeline

    texts = write_texts(folder / "in", arguments.texts, arguments.words)
    write_texts(folder / "other", arguments.texts, arguments.words, files=3, order=1)
    model = make_model(folder / "model", arguments.size)
    distinct = list(dict.fromkeys(texts))
    keys = corpus.Settings("sentence-embedding", model).keys([(text,) for text in distinct])
    serve = pipeline("sentence-embedding", model)
    tables = []
    for i in range(0, len(distinct), 10_000):
        vectors = serve(distinct[i : i + 10_000])
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        tables.append(pa.table({"key": pa.array(keys[i : i + 10_000], pa.binary(32)), "vector": column}))
    found = {"notebook": corpus.digest_of(tables)}
    del tables
    for engine in arguments.engine:
        job(folder / "in", folder / engine, model, engine)
        found[engine] = corpus.digest(folder / engine)
    first = arguments.engine[0]
    job(folder / "in", folder / "shards", model, first, shard_size=333)
    found["shards of 333"] = corpus.digest(folder / "shards")
    job(folder / "other", folder / "order", model, first)
    found["another order of files"] = corpus.digest(folder / "order")
    for engine in arguments.engine if arguments.kills else ():
        kills = killed_job(folder / "in", folder / f"killed {engine}", model, engine, arguments.kills)
        found[f"{engine}, killed {kills} times"] = corpus.digest(folder / f"killed {engine}")
    for name, digest in found.items():
        print(f"{name:<40}{digest}")
    same = len(set(found.values())) == 1
    print("one result" if same else "NOT ONE RESULT")
    return {"texts": len(distinct), "digests": found, "same": same}


def stream(arguments, folder):
    write_texts(folder / "in", arguments.texts, arguments.words)
    model = make_model(folder / "model", arguments.size)
    out = {"bare": bare(folder / "in", model)}
    print(f"{'bare pipeline':<30}{out['bare']['texts_per_second']:>12,.0f} texts/s")
    for engine in arguments.engine:
        _, lines = job(folder / "in", folder / "out", model, engine, shard_size=shard_size(arguments))
        last = lines[-1]
        first_seconds, first_texts = lines[0]["seconds"], lines[0]["texts"]  # up to the first shard the model is loaded
        rate = (last["texts"] - first_texts) / max(1e-9, last["seconds"] - first_seconds)
        alive = [line for line in lines if line["memory_of_workers"]] or lines  # processes end before the last line
        out[engine] = {
            "texts_per_second": rate,
            "of_bare": rate / out["bare"]["texts_per_second"],
            "memory_early": [alive[0]["memory"], *alive[0]["memory_of_workers"]],
            "memory_at_end": [alive[-1]["memory"], *alive[-1]["memory_of_workers"]],
            "most": [
                max(line["memory"] for line in lines),
                max((sum(n["memory_of_workers"]) for n in lines), default=0),
            ],
        }
        memory = " ".join(f"{n / 2**20:,.0f}" for n in out[engine]["memory_early"])
        at_end = " ".join(f"{n / 2**20:,.0f}" for n in out[engine]["memory_at_end"])
        print(
            f"{engine:<30}{rate:>12,.0f} texts/s, {out[engine]['of_bare']:.0%} of the bare pipeline; MiB of each "
            f"process {memory} early, {at_end} at the end"
        )
        shutil.rmtree(folder / "out")
    return out


def shard_size(arguments):
    """That of jobs, or less, so that there are some shards after the first."""
    return max(16, min(4096, arguments.texts // 20))


def bare(places, model):
    """`pipeline.stream` over the same texts, in a process of its own."""
    done = subprocess.run(
        [sys.executable, HERE, "bare", json.dumps([str(places), model])], check=True, capture_output=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def run_bare(places, model):
    from modernbert import pipeline
    from modernbert.io.tables import read_records

    serve = pipeline("sentence-embedding", model)
    serve(["warm"] * 8)
    begun, count = time.monotonic(), 0
    texts = dict.fromkeys(record["text"] for path in sorted(Path(places).iterdir()) for record in read_records(path))
    for _ in serve.stream(iter(texts)):
        count += 1
    print(json.dumps({"texts_per_second": count / (time.monotonic() - begun), "texts": count}))


def peer(arguments, folder):
    write_texts(folder / "in", arguments.texts, arguments.words)
    model = make_model(folder / "model", arguments.size)
    out = {}
    for batch in (32, 256):
        command = [sys.executable, HERE, "map", json.dumps([str(folder / "in"), model, batch])]
        out[f"datasets.map-{batch}"] = json.loads(
            subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1]
        )
    for engine in arguments.engine:
        _, lines = job(folder / "in", folder / engine, model, engine, shard_size=shard_size(arguments))
        rate = (lines[-1]["texts"] - lines[0]["texts"]) / max(1e-9, lines[-1]["seconds"] - lines[0]["seconds"])
        out[engine] = {"texts_per_second": rate}
    best = max(value["texts_per_second"] for name, value in out.items() if name.startswith("datasets"))
    for name, value in out.items():
        print(f"{name:<30}{value['texts_per_second']:>12,.1f} texts/s, {value['texts_per_second'] / best:.2f} x")
    return out


def run_map(places, model, batch):
    """What a user of the datasets library writes."""
    import datasets
    from sentence_transformers import SentenceTransformer

    from modernbert.io.tables import read_records

    texts = list(dict.fromkeys(r["text"] for path in sorted(Path(places).iterdir()) for r in read_records(path)))
    encoder = SentenceTransformer(model, device="cpu")
    encoder.encode(["warm"] * 8)
    rows = datasets.Dataset.from_dict({"text": texts})
    begun = time.monotonic()
    rows.map(
        lambda some: {"vector": encoder.encode(some["text"], batch_size=batch)},
        batched=True,
        batch_size=1000,
        load_from_cache_file=False,
    )
    print(json.dumps({"texts_per_second": len(texts) / (time.monotonic() - begun)}))


def main():
    if sys.argv[1:2] == ["job"]:
        from modernbert import corpus

        places, output, model, options = json.loads(sys.argv[2])
        corpus.run(places, output, "sentence-embedding", model, **options)
        return
    if sys.argv[1:2] in (["bare"], ["map"]):
        {"bare": run_bare, "map": run_map}[sys.argv[1]](*json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("digests", "stream", "peer"))
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--words", type=int, default=12, help="the mean number of words of a text")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument(
        "--engine", action="append", help="NAME:OPTION=VALUE,... (default: local with 1 and 2 processes)"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    arguments.engine = arguments.engine or ["local:processes=1", "local:processes=2"]
    with tempfile.TemporaryDirectory(prefix="corpus-") as folder:
        found = {"digests": digests, "stream": stream, "peer": peer}[arguments.what](arguments, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
