"""Jobs over corpora: one result whatever ran it, throughput beside the bare pipeline, memory, and a peer.

    pip install -c constraints.txt -e '.[dev]'
    python benchmarks/corpus.py digests --texts 2000           # at length: --texts 100000 --kills 5
    python benchmarks/corpus.py stream --texts 2000            # at length: --texts 1000000 --words 12
    python benchmarks/corpus.py peer --texts 200 --size small  # at length: --texts 20000 --size base --words 200
    python benchmarks/corpus.py stream --engine local --engine ray:actors=2

Texts are random words drawn by Zipf's law, of 1 to 2 x `--words` words, a hundredth of them duplicates. `--size base`
has random weights.

- digests: the SHA-256 over sorted keys and vectors of a pipeline called in this process, of each engine, of another
  shard size, of another order of files, of a job that is killed (-9) at random moments and run again, and of one
  whose workers (processes, actors) are killed in mid-shard, by as many kills.
- stream: texts a second of `pipeline.stream` alone (over the first 100,000 texts, before the engines and after them)
  and of each engine, each in a process of its own, on the same cores, loading not counted; and the memory of every
  process after its first shard and at the end.
- peer: the same beside `datasets.map` with sentence-transformers, batches of 32 and of 256, the better one counts.
"""

import argparse
import contextlib
import itertools
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


def begun_job(places, output, model, engine, size):
    """A job that runs in a process of its own."""
    given = json.dumps([str(places), str(output), model, {**parsed(engine), "shard_size": size}])
    return subprocess.Popen([sys.executable, HERE, "job", given], start_new_session=True)


def moments(texts, size, kills, seed=0):
    """After how many shards of a job it is killed, and how many seconds later: anywhere in it."""
    chance = random.Random(seed)
    counts = sorted(chance.randint(1, max(kills + 1, texts // size * 9 // 10)) for _ in range(kills))
    return [(count, chance.random() / 20) for count in counts]


def shards_in(output):
    """How many shards are finished, and how many are being computed."""
    return len(list(Path(output, "shards").glob("part*"))), len(list(Path(output, "work").glob("part*")))


def begun_again(output):
    """Whether a shard is being computed whose worker died."""
    for note in Path(output, "work").glob("part*"):
        with contextlib.suppress(OSError, ValueError):
            if json.loads(note.read_text())["attempts"] > 1:
                return True
    return False


def killed_job(places, output, model, engine, kills, texts, size=64):
    """Begin a job and kill it as often as this; then let it end. How often it was running when it was killed."""
    done = 0
    for wanted, later in moments(texts, size, kills):
        process = begun_job(places, output, model, engine, size)
        while process.poll() is None and shards_in(output)[0] < wanted:
            time.sleep(0.01)
        time.sleep(later)
        process.kill()
        done += process.wait() == -signal.SIGKILL
    job(places, output, model, engine)
    return done


def job_of_killed_workers(places, output, model, engine, kills, texts, size=256):
    """Run a job and kill one of its workers as often as this; how often it was in the middle of a shard."""
    import psutil

    done, chance = 0, random.Random(1)
    process = begun_job(places, output, model, engine, size)
    for wanted, later in moments(texts, size, kills, seed=1):
        while process.poll() is None and (shards_in(output)[0] < wanted or not shards_in(output)[1]):
            time.sleep(0.002)
        time.sleep(later)
        workers = []
        for one in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
            with contextlib.suppress(psutil.Error):
                words = " ".join(one.cmdline())
                workers += [one] * ("modernbert.corpus.worker" in words or "ray::_Actor" in words)
        if not workers:
            continue
        with contextlib.suppress(psutil.Error):
            chance.choice(workers).kill()
        until = time.monotonic() + 30
        while not (again := begun_again(output)) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.001)
        done += again
    if process.wait():
        sys.exit(f"the job of {engine} whose workers were killed ended with exit code {process.returncode}")
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
    found = {}

    def tell(name, digest):
        found[name] = digest
        print(f"{name:<56}{digest}", flush=True)

    tell("notebook", corpus.digest_of(tables))
    del tables
    for engine in arguments.engine:
        job(folder / "in", folder / engine, model, engine)
        tell(engine, corpus.digest(folder / engine))
    first = arguments.engine[0]
    job(folder / "in", folder / "shards", model, first, shard_size=333)
    tell("shards of 333", corpus.digest(folder / "shards"))
    job(folder / "other", folder / "order", model, first)
    tell("another order of files", corpus.digest(folder / "order"))
    for engine in (arguments.killed or arguments.engine) if arguments.kills else ():
        output = folder / f"killed {engine}"
        kills = killed_job(folder / "in", output, model, engine, arguments.kills, len(distinct))
        tell(f"{engine}, killed {kills} times", corpus.digest(output))
        shutil.rmtree(output)
        kills = job_of_killed_workers(folder / "in", output, model, engine, arguments.kills, len(distinct))
        tell(f"{engine}, {kills} workers killed in mid-shard", corpus.digest(output))
        shutil.rmtree(output)
    same = len(set(found.values())) == 1
    print("one result" if same else "NOT ONE RESULT")
    return {"texts": len(distinct), "digests": found, "same": same}


def stream(arguments, folder):
    write_texts(folder / "in", arguments.texts, arguments.words)
    model = make_model(folder / "model", arguments.size)
    out = {"bare": [bare(folder / "in", model)]}
    print(f"{'bare pipeline, before':<30}{out['bare'][0]['texts_per_second']:>12,.0f} texts/s", flush=True)
    for engine in arguments.engine:
        _, lines = job(folder / "in", folder / "out", model, engine, shard_size=shard_size(arguments))
        last = lines[-1]
        first_seconds, first_texts = lines[0]["seconds"], lines[0]["texts"]  # up to the first shard the model is loaded
        rate = (last["texts"] - first_texts) / max(1e-9, last["seconds"] - first_seconds)
        alive = [line for line in lines if line["memory_of_workers"]] or lines  # processes end before the last line
        out[engine] = {
            "texts_per_second": rate,
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
            f"{engine:<30}{rate:>12,.0f} texts/s; MiB of each process {memory} early, {at_end} at the end", flush=True
        )
        shutil.rmtree(folder / "out")
    out["bare"].append(bare(folder / "in", model))
    print(f"{'bare pipeline, after':<30}{out['bare'][1]['texts_per_second']:>12,.0f} texts/s")
    usual = sum(one["texts_per_second"] for one in out["bare"]) / 2
    for engine in arguments.engine:
        out[engine]["of_bare"] = out[engine]["texts_per_second"] / usual
        print(f"{engine:<30}{out[engine]['of_bare']:>12.0%} of the mean of the two")
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
    records = (record["text"] for path in sorted(Path(places).iterdir()) for record in read_records(path))
    texts = dict.fromkeys(itertools.islice(records, 100_000))
    for _ in serve.stream(iter(texts)):
        count += 1
    print(json.dumps({"texts_per_second": count / (time.monotonic() - begun), "texts": count}))


def peer(arguments, folder):
    write_texts(folder / "in", arguments.texts, arguments.words)
    model = make_model(folder / "model", arguments.size)
    out = {}
    for batch in (32, 256):
        command = [sys.executable, HERE, "map", json.dumps([str(folder / "in"), model, batch, arguments.dtype])]
        out[f"datasets.map-{batch}"] = json.loads(
            subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1]
        )
    for engine in arguments.engine:
        how = {"shard_size": shard_size(arguments), "dtype": arguments.dtype}
        _, lines = job(folder / "in", folder / engine, model, engine, **how)
        rate = (lines[-1]["texts"] - lines[0]["texts"]) / max(1e-9, lines[-1]["seconds"] - lines[0]["seconds"])
        out[engine] = {"texts_per_second": rate}
    best = max(value["texts_per_second"] for name, value in out.items() if name.startswith("datasets"))
    for name, value in out.items():
        print(f"{name:<30}{value['texts_per_second']:>12,.1f} texts/s, {value['texts_per_second'] / best:.2f} x")
    return out


def run_map(places, model, batch, dtype):
    """What a user of the datasets library writes."""
    import datasets
    from sentence_transformers import SentenceTransformer

    from modernbert.io.tables import read_records

    texts = list(dict.fromkeys(r["text"] for path in sorted(Path(places).iterdir()) for r in read_records(path)))
    encoder = SentenceTransformer(model, device="cpu", model_kwargs={"dtype": dtype})
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
    parser.add_argument("--killed", action="append", help="an engine whose jobs are killed (default: each)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of both, for peer")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    arguments.engine = arguments.engine or ["local:processes=1", "local:processes=2"]
    with tempfile.TemporaryDirectory(prefix="corpus-") as folder:
        found = {"digests": digests, "stream": stream, "peer": peer}[arguments.what](arguments, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
