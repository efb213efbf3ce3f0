"""An index of many passages: time and memory of making it, and of searches in it.

    pip install -c constraints.txt -e '.[dev,search]'
    python benchmarks/search.py --passages 50000
    python benchmarks/search.py --passages 50000 --model FOLDER_OR_REPOSITORY --json search.json

The passages are rows of a .jsonl file, sentences of random words drawn by Zipf's law, so that words are as common
and as rare as in a language. Indexing runs in a process of its own and searching in another, which is warm: its model
is loaded and it has answered a few questions. A search is timed whole: the question's vector, both lists, the fusion.
Memory is the most that a process held (its peak), and what it held before the first passage.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def write_corpus(path, passages, words, vocabulary=20_000, seed=0):
    """A row a passage, of this many words, with a number to filter by."""
    import numpy as np

    generator = np.random.default_rng(seed)
    parts = ["ka", "lo", "mi", "ne", "ru", "sta", "ti", "vor", "we", "zen", "dal", "fi"]
    known = ["".join(generator.choice(parts, generator.integers(1, 5))) for _ in range(vocabulary)]
    rank = np.arange(1, vocabulary + 1)
    chances = 1 / rank / (1 / rank).sum()
    with path.open("w", encoding="utf-8") as file:
        for number in range(passages):
            drawn = [known[i] for i in generator.choice(vocabulary, words, p=chances)]
            text = ". ".join(" ".join(drawn[i : i + 12]).capitalize() for i in range(0, words, 12)) + "."
            file.write(json.dumps({"text": text, "number": number}) + "\n")


def questions_of(path, count):
    """Six words of a passage each, of passages all over the corpus."""
    lines = path.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(lines[i * len(lines) // count])["text"].split() for i in range(count)]
    return [" ".join(text[3:9]) for text in texts]


def peak():
    """Bytes of memory that the process held at the most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make(corpus, folder, model):
    from modernbert import pipeline
    from modernbert.indexing import build_index

    pipeline("sentence-embedding", model)("warm")
    before, began = peak(), time.perf_counter()
    report = build_index(corpus, folder, model)
    size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {
        "passages": report.passages,
        "seconds": time.perf_counter() - began,
        "memory_before": before,
        "memory": peak(),
        "bytes_on_disk": size,
    }


def ask(corpus, folder, questions):
    from modernbert.indexing import open_index

    index = open_index(folder)
    asked = questions_of(Path(corpus), questions + 5)
    out = {}
    for by, where in (("both", None), ("vectors", None), ("words", None), ("both", "number < 1000")):
        times = []
        for question in asked:
            began = time.perf_counter()
            index.search(question, by=by, where=where)
            times.append(1e3 * (time.perf_counter() - began))
        times = sorted(times[5:])
        name = by if where is None else f"{by}, {where}"
        out[name] = {"p50_ms": statistics.median(times), "p99_ms": times[int(0.99 * (len(times) - 1))]}
    return {"searches": out, "memory": peak()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=50_000)
    parser.add_argument("--words", type=int, default=60, help="words of a passage")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--model", help="folder or Hub repository; by default the package's small encoder")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--part", choices=["make", "ask"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        corpus, folder = Path(given.folder) / "corpus.jsonl", Path(given.folder) / "index"
        found = make(corpus, folder, given.model) if given.part == "make" else ask(corpus, folder, given.questions)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "corpus.jsonl", given.passages, given.words)
        results = {}
        for part in ("make", "ask"):
            command = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--folder", folder]
            run = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            results[part] = json.loads(run.stdout.splitlines()[-1])
    made, asked = results["make"], results["ask"]
    print(
        f"{made['passages']:,} passages in {made['seconds']:.1f} s: {made['passages'] / made['seconds']:,.0f} a second"
    )
    print(f"memory {made['memory'] / 1e6:,.0f} MB, {made['memory_before'] / 1e6:,.0f} MB before the first passage")
    print(f"{made['bytes_on_disk'] / 1e6:,.0f} MB on disk")
    for name, times in asked["searches"].items():
        print(f"search by {name:<22} p50 {times['p50_ms']:7.1f} ms   p99 {times['p99_ms']:7.1f} ms")
    print(f"memory of the process that searches: {asked['memory'] / 1e6:,.0f} MB")
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
