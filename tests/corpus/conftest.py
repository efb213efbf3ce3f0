"""A small corpus in files of every form, and what a notebook's pipeline says of it."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modernbert import corpus, pipeline
from modernbert.corpus import Settings

WORDS = [
    *("the", "dog", "ran", "across", "the", "road", "and", "a", "cat", "looked", "at"),
    *("it", "from", "a", "window", "of", "an", "old", "house", "by", "the", "sea"),
]
TEXTS = [f"{i} " + " ".join(WORDS[j % len(WORDS)] for j in range(i % 7, i % 7 + 1 + (5 * i) % 23)) for i in range(160)]
HERE = ["processes=0"]  # computes in this process, as fast as a test can be


@pytest.fixture(scope="session")
def model(heads):
    return heads / "Model"


def write_corpus(folder, texts, names=("a.txt", "b.jsonl", "c.csv", "d.parquet")):
    """The texts in four files, a quarter in each; each file repeats the first text."""
    folder.mkdir(parents=True)
    quarter = -(-len(texts) // 4)
    parts = [[texts[0], *texts[i : i + quarter]] for i in range(0, len(texts), quarter)]
    (folder / names[0]).write_text("\n".join(parts[0]) + "\n\n", encoding="utf-8")
    (folder / names[1]).write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(parts[1])))
    with (folder / names[2]).open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(parts[2])])
    table = pa.table({"id": pa.array(range(len(parts[3])), pa.int32()), "text": parts[3]})
    pq.write_table(table, folder / names[3])
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "in", TEXTS)


@pytest.fixture(scope="session")
def notebook(model):
    """The digest of what a pipeline answers when it is called with a list."""
    vectors = pipeline("sentence-embedding", model)(TEXTS)
    keys = Settings("sentence-embedding", str(model)).keys([(text,) for text in TEXTS])
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    return corpus.digest_of([pa.table({"key": pa.array(keys, pa.binary(32)), "vector": column})])


@pytest.fixture
def run(model, folder, tmp_path):
    """A job over the small corpus, in this process unless told otherwise."""

    def run(places=folder, output=tmp_path / "out", task="sentence-embedding", model=model, **options):
        return corpus.run(places, output, task, model, **{"engine_options": HERE, **options})

    return run
