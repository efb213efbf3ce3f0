"""Classes of words, such as the names of people and places."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modernbert.auto import AutoModelForTokenClassification
from modernbert.config import Config
from modernbert.errors import InputError
from modernbert.io.tables.columns import Field
from modernbert.nn.losses import IGNORED
from modernbert.text.tokenizer import Tokenizer
from modernbert.training.contract import Batch, Evaluation
from modernbert.training.examples import Example
from modernbert.training.tasks.base import Task, worst
from modernbert.training.tasks.data import Row
from modernbert.training.tasks.labels import Labels, class_weights, is_ignored
from modernbert.training.tasks.metrics import tag_metrics
from modernbert.training.tasks.options import FinetuneOptions

_ENTITY = re.compile(r"O|[BIESLU]-.+")


class TokenClassification(Task):
    """A classifier of words: the first token of each has the word's tag, the others do not count.

    Rows hold words and their tags, lists of one length; a .conll file holds a word and its tag a line. A tag of -100
    does not count, in training and in evaluation.
    """

    name = "token-classification"
    auto_model = AutoModelForTokenClassification
    fields = (
        Field("tokens", ("words", "text", "sentence"), many=True, words=True),
        Field("tags", ("ner_tags", "labels", "pos_tags", "chunk_tags", "ner", "label"), many=True, words=True),
    )
    metric = "f1"

    def fit_labels(self, rows: Sequence[Row]) -> None:
        """The names of tags, and whether they are those of entities."""
        tags = [tag for row in rows for tag in _tags(row) if not is_ignored(tag)]
        if self.options.labels is not None:
            self.names = Labels.read(self.options.labels)
        else:
            self.names = Labels.found_in(tags)
            if not all(name.isdecimal() for name in self.names.names):
                # "O" first, then each type's beginning beside its inside.
                order = sorted(self.names.names, key=lambda tag: (tag != "O", tag.partition("-")[2] or tag, tag))
                self.names = Labels(order)
        # Tags of another kind, such as parts of speech, make no entities.
        self.has_entities = all(_ENTITY.fullmatch(name) for name in self.names.names)
        self.metric = "f1" if self.has_entities else "accuracy"

    def align_labels(self, config: Config) -> None:
        self.names = self.names.aligned(config)

    def config_changes(self) -> dict[str, Any]:
        return self.names.config_changes()

    def load_tokenizer(self, name: str | Path, options: FinetuneOptions) -> Tokenizer:
        """The model's tokenizer for words: each begins with a space, the first one too."""
        try:
            return Tokenizer.from_pretrained(name, revision=options.revision, add_prefix_space=True)
        except InputError:  # not a byte-level one
            return super().load_tokenizer(name, options)

    def prepare(self, rows: Sequence[Row], training: bool) -> list[Example]:
        """An example for each row; words that are cut off count as wrong in evaluation, unless their tag is "O"."""
        numbers = []
        for row in rows:
            words, tags = row.values["tokens"], _tags(row)
            if len(words) != len(tags):
                raise InputError(f"{row.where} has {len(words)} words and {len(tags)} tags; give each word one tag")
            if not words:
                raise InputError(f"{row.where} has no words; give at least one")
            if bad := [word for word in words if not isinstance(word, str) or not word]:
                raise InputError(f"{row.where} has the word {bad[0]!r}; each must be a text that is not empty")
            known = (IGNORED if self.names.leaves_out(tag) else self.names.number(tag, row.where) for tag in tags)
            numbers.append(list(known))
        if left_out := sum(tags.count(IGNORED) for tags in numbers):
            counted = [any(tag != IGNORED for tag in tags) for tags in numbers]
            rows, numbers = list(compress(rows, counted)), list(compress(numbers, counted))
            self.notes.append(f"not counted, as the tag is -100: {left_out} words")
        if training and self.options.class_weights:
            words = [[tag] for tags in numbers for tag in tags if tag != IGNORED]
            self.class_weights = class_weights(self.options.class_weights, self.names, words, False)
        encodings = self.encode([row.values["tokens"] for row in rows], is_split_into_words=True)
        examples = []
        for row, encoding, tags in zip(rows, encodings, numbers, strict=True):
            firsts: dict[int, int] = {}  # the first token of each word
            for place, word in enumerate(encoding.word_ids):
                if word is not None:
                    firsts.setdefault(word, place)
            label = [IGNORED] * len(encoding.ids)
            for word, place in firsts.items():
                label[place] = tags[word]
            named = [None if tag == IGNORED else self.names.names[tag] for tag in tags]
            examples.append(
                Example([encoding.ids], label, {"words": row.values["tokens"], "tags": named, "firsts": firsts})
            )
        return examples

    def labels(self, examples: Sequence[Example]) -> Batch:
        """(T,) classes, -100 where nothing counts."""
        return {"labels": torch.tensor([tag for example in examples for tag in example.label])}

    def answers(self, output: Any) -> Tensor:
        return super().answers(output).argmax(-1)

    def evaluate_on(self, model: Any, examples: Sequence[Example]) -> Evaluation:
        """Precision, recall and F1 of whole entities."""
        names = self.names.names
        cut_off = "O" if "O" in names else "(cut off)"
        wrong, predictions, truth, predicted = [], [], [], []
        for example, output in zip(examples, self.outputs(model, examples), strict=True):
            words, tags, firsts = (example.record[name] for name in ("words", "tags", "firsts"))
            best = output.tolist()
            found = [names[best[firsts[word]]] if word in firsts else cut_off for word in range(len(words))]
            predictions.append({"tokens": words, "tags": tags, "predicted": found})
            counted = [each for each in zip(words, tags, found, strict=True) if each[1] is not None]
            truth.append([tag for _, tag, _ in counted])
            predicted.append([tag for _, _, tag in counted])
            if missed := [f"{word}: {tag} as {given}" for word, tag, given in counted if tag != given]:
                wrong.append((len(missed), {"text": " ".join(words), "wrong": "; ".join(missed)}))
        metrics, confusion = tag_metrics(truth, predicted, names, self.has_entities)
        return Evaluation(metrics, names, confusion, worst(wrong), predictions)


def _tags(row: Row) -> list[Any]:
    tags: list[Any] = row.values["tags"]
    if None in tags:
        raise InputError(f"{row.where} has no tag for a word; give -100 where a word is not to count")
    return tags
