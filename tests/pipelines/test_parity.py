"""Pipelines beside those of transformers: the same checkpoints, the same real texts, the same answers."""

import csv
import json
import logging
import random

import pytest
import torch
import transformers

import modernbert
from modernbert import pipeline
from modernbert.text.tokenizer import Tokenizer
from tests.conftest import SPECIAL_TOKENS
from tests.heads import HEADS
from tests.pipelines.peers import close

TAGS = ["O", "B-person", "I-person", "B-location", "I-location"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, data):
    """A random checkpoint of each head, with the real tokenizer."""
    root = tmp_path_factory.mktemp("heads")
    tokenizer = Tokenizer.from_pretrained(data / "tokenizer", model_max_length=512, **SPECIAL_TOKENS)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = modernbert.ModernBertConfig(**sizes, max_position_embeddings=512, initializer_range=0.2)
    labels = {
        "TokenClassification": dict(enumerate(TAGS)),
        "SequenceClassification": {0: "contradiction", 1: "entailment", 2: "neutral"},
    }
    out = {}
    for head, cls in HEADS.items():
        torch.manual_seed(1)
        model = getattr(modernbert, cls)(config.replace(id2label=labels.get(head, {0: "no", 1: "yes"})))
        if hasattr(model, "classifier"):
            with torch.no_grad():  # scores that are far apart
                model.classifier.weight.mul_(4)
        out[head] = root / head
        model.save_pretrained(out[head])
        tokenizer.save_pretrained(out[head])
    return out


def pair(task, folder, **options):
    return pipeline(task, folder, **options), transformers.pipeline(task, model=str(folder), **options)


@pytest.fixture(scope="module")
def sentences(data):
    with (data / "classification" / "banking77-train.csv").open(newline="") as file:
        rows = [row["text"] for row in csv.DictReader(file)]
    return random.Random(0).sample(rows, 25)


@pytest.fixture(scope="module")
def articles(data):
    lines = (data / "text" / "wikipedia" / "articles.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines[:6]]


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_k": 2}, {"top_k": None}, {"function_to_apply": "sigmoid"}])
def test_text_classification(folders, sentences, options):
    ours, theirs = pair("text-classification", folders["SequenceClassification"])
    close(ours(sentences, **options), theirs(sentences, **options))
    close(ours(sentences[0], **options), theirs(sentences[0], **options))
    pairs = [{"text": a, "text_pair": b} for a, b in zip(sentences[:5], sentences[5:10], strict=True)]
    close(ours(pairs, **options), theirs(pairs, **options))
    close(ours(pairs[0], **options), theirs(pairs[0], **options))
    if options:
        made = pair("text-classification", folders["SequenceClassification"], **options)
        close(made[0](sentences[0]), made[1](sentences[0]))
        close(made[0](sentences[:2]), made[1](sentences[:2]))


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", "single_label_classification"])
def test_the_function_follows_the_problem(folders, sentences, problem):
    model = modernbert.AutoModelForSequenceClassification.from_pretrained(
        folders["SequenceClassification"], problem_type=problem
    )
    ours = pipeline("text-classification", model, str(folders["SequenceClassification"]))
    theirs = transformers.pipeline("text-classification", model=str(folders["SequenceClassification"]))
    theirs.model.config.problem_type = problem
    close(ours(sentences[:5], top_k=None), theirs(sentences[:5], top_k=None))


def test_truncation(folders, articles):
    ours, theirs = pair("text-classification", folders["SequenceClassification"])
    for options in ({"truncation": True}, {"truncation": True, "max_length": 60, "padding": True}):
        close(ours(articles, **options), theirs(articles, **options))


@pytest.mark.parametrize("options", [{}, {"multi_label": True}, {"hypothesis_template": "It is about {}!"}])
@pytest.mark.parametrize("labels", [["cards", "money", "travel"], "cards, money", ["cards"]])
def test_zero_shot_classification(folders, sentences, labels, options):
    ours, theirs = pair("zero-shot-classification", folders["SequenceClassification"])
    close(ours(sentences[:8], labels, **options), theirs(sentences[:8], labels, **options))
    close(
        ours(sentences[0], candidate_labels=labels, **options), theirs(sentences[0], candidate_labels=labels, **options)
    )


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_token_classification(folders, sentences, strategy):
    ours, theirs = pair("token-classification", folders["TokenClassification"], aggregation_strategy=strategy)
    texts = [*sentences, "Ångström met   Müller–Lyer in New York, didn't he? 🙂 ok", "x"]
    close(ours(texts), theirs(texts))
    close(ours(texts[0]), theirs(texts[0]))
    every = {"ignore_labels": ["B-person"]}
    close(ours(texts, **every), theirs(texts, **every))


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_words_that_are_split_already(folders, data, strategy):
    blocks = (data / "ner" / "wnut17-dev.conll").read_text().split("\n\n")[:20]
    texts = [[line.split("\t")[0] for line in block.splitlines() if line.strip()] for block in blocks]
    ours, theirs = pair("ner", folders["TokenClassification"], aggregation_strategy=strategy)
    close(ours(texts[0], is_split_into_words=True), theirs(texts[0], is_split_into_words=True))
    for options in ({}, {"delimiter": "_"}):
        close(ours(texts, is_split_into_words=True, **options), theirs(texts, is_split_into_words=True, **options))


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize(("strategy", "stride"), [("simple", 0), ("first", 20), ("average", 200), ("max", 20)])
def test_long_texts_in_windows(folders, articles, strategy, stride):
    ours, theirs = pair("ner", folders["TokenClassification"], aggregation_strategy=strategy, stride=stride)
    assert any(len(ours.tokenizer(text).input_ids) > 1024 for text in articles)
    close(ours(articles), [theirs(text) for text in articles])


@pytest.mark.parametrize("options", [{}, {"truncation": True}, {"tokenize_kwargs": {"add_special_tokens": False}}])
def test_feature_extraction(folders, sentences, options):
    ours, theirs = pair("feature-extraction", folders["Model"])
    close(ours(sentences[:4], **options), theirs(sentences[:4], **options))
    tensor = ours(sentences[0], return_tensors=True, **options)
    expected = theirs(sentences[0], return_tensors=True, **options)
    torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-5)


def test_the_log_stays_quiet(folders, sentences, caplog):
    caplog.set_level(logging.WARNING, logger="modernbert")
    pipeline("text-classification", folders["SequenceClassification"])(sentences)
    assert not [record for record in caplog.records if record.name.startswith("modernbert")]
