"""Documents, a tokenizer of them, and prepared data."""

import json
import random

import pytest

from modernbert.training.pretraining.prepare import prepare_data
from modernbert.training.pretraining.train_tokenizer import save_tokenizer, train_tokenizer
from tests.training.tasks.conftest import WORDS

SIZES = {"hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 2, "initializer_range": 0.1}


def story(rng, sentences):
    return " ".join(" ".join(rng.choices(WORDS, k=rng.randint(3, 9))).capitalize() + "." for _ in range(sentences))


@pytest.fixture(scope="session")
def documents():
    rng = random.Random(0)
    return [story(rng, rng.randint(1, 60)) for _ in range(80)]


@pytest.fixture(scope="session")
def tokenizer(documents):
    return train_tokenizer(documents, 320)


@pytest.fixture(scope="session")
def raw(documents, tokenizer, tmp_path_factory):
    """Two files of rows, and the tokenizer's folder."""
    folder = tmp_path_factory.mktemp("raw")
    for name, some in (("first", documents[:50]), ("second", documents[50:])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in some))
    save_tokenizer(tokenizer, folder / "tokenizer", 32)
    return folder


@pytest.fixture(scope="session")
def prepared(raw):
    """Prepared: two sources, texts of at most 32 tokens."""
    paths = [raw / "first.jsonl", raw / "second.jsonl"]
    prepare_data(paths, raw / "tokenizer", raw / "data", max_length=32, held_out=0.1, short=0.3)
    return raw / "data"
