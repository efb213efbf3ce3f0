"""Classes of words, such as the names of people and places."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modernbert.auto import AutoModelForTokenClassification
from modernbert.config import Config
from modernbert.errors import InputError
from modernbert.io.tables.columns import Field
from modernbert.nn.losses import IGNORED
from modernbert.text.tokenizer import Tokenizer
from modernbert.training.contract import Batch, Evaluation
from modernbert.training.examples import Example
from modernbert.training.tasks.base import Task, shown, worst
from modernbert.training.tasks.data import Row
from modernbert.training.tasks.labels import Labels, is_ignored
from modernbert.training.tasks.metrics import entity_figures
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

    def learn(self, rows: Sequence[Row]) -> None:
        """The names of tags, and whether they make entities."""
        for row in rows:
            if None in row.values["tags"]:
                raise InputError(f"{row.where} has no tag for a word; give -100 where a word is not to count")
        if self.options.labels is not None:
            self.names = Labels.named(self.options.labels)
        else:
            self.names = Labels.found(tag for row in rows for tag in row.values["tags"] if not is_ignored(tag))
            if not all(name.isdecimal() for name in self.names.names):
                # "O" first, then each type's beginning beside its inside.
                order = sorted(self.names.names, key=lambda tag: (tag != "O", tag.partition("-")[2] or tag, tag))
                self.names = Labels(order)
        # Tags of another kind, such as parts of speech, make no entities.
        self.has_entities = all(_ENTITY.fullmatch(name) for name in self.names.names)
        self.metric = "f1" if self.has_entities else "accuracy"

    def adopt(self, config: Config) -> None:
        """Go on with the model's labels where it knows all of the data's."""
        self.names = self.names.of_model(config)

    def config_changes(self) -> dict[str, Any]:
        """Labels."""
        return self.names.config_changes()

    def load_tokenizer(self, name: str | Path, options: FinetuneOptions) -> Tokenizer:
        """The model's tokenizer, for words: each begins with a space, the first one too."""
        try:
            return Tokenizer.from_pretrained(name, revision=options.revision, add_prefix_space=True)
        except AttributeError:  # of another kind than byte-level
            return super().load_tokenizer(name, options)

    def prepare(self, rows: Sequence[Row], training: bool) -> list[Example]:
        """One row each; words that the context cuts off are wrong in evaluation, unless their tag is "O"."""
        for row in rows:
            words, tags = row.values["tokens"], row.values["tags"]
            if len(words) != len(tags):
                raise InputError(f"{row.where} has {len(words)} words and {len(tags)} tags; they must be as many")
            bad = next((word for word in words if not isinstance(word, str) or not word), None)
            if bad is not None or not words:
                raise InputError(
                    f"{row.where} has {'the word ' + repr(bad) if words else 'no words'}; texts are wanted"
                )
        numbers = [[self._number(tag, row) for tag in row.values["tags"]] for row in rows]
        left_out = sum(tags.count(IGNORED) for tags in numbers)
        if left_out:
            counted = [any(tag != IGNORED for tag in tags) for tags in numbers]
            rows, numbers = list(compress(rows, counted)), list(compress(numbers, counted))
            self.notes.append(f"not counted, as the tag is -100: {left_out} words")
        encoded = self.tokenizer(
            [row.values["tokens"] for row in rows],
            is_split_into_words=True,
            truncation=True,
            max_length=self.max_length,
        )
        assert encoded.encodings is not None
        self.note_cut(sum(bool(e.overflowing) for e in encoded.encodings), len(rows))
        examples = []
        for row, encoding, tags in zip(rows, encoded.encodings, numbers, strict=True):
            label, before = [], None
            for word in encoding.word_ids:
                label.append(IGNORED if word is None or word == before else tags[word])
                before = word
            firsts = {word: i for i, word in reversed(list(enumerate(encoding.word_ids))) if word is not None}
            named = [None if tag == IGNORED else self.names.names[tag] for tag in tags]
            record = {"words": row.values["tokens"], "tags": named, "firsts": firsts}
            examples.append(Example([encoding.ids], label, record))
        return examples

    def _number(self, tag: Any, row: Row) -> int:
        if tag is None:
            raise InputError(f"{row.where} has no tag for a word; give -100 where a word is not to count")
        return IGNORED if self.names.leaves_out(tag) else self.names.number(tag, row.where)

    def labels(self, examples: Sequence[Example]) -> Batch:
        """(T,) classes, -100 where nothing counts."""
        return {"labels": torch.tensor([tag for example in examples for tag in example.label])}

    def judge(self, model: Any, examples: Sequence[Example]) -> Evaluation:
        """Precision, recall and F1 of whole entities."""
        said: list[list[str]] = [[] for _ in examples]
        names = self.names.names
        nothing = "O" if "O" in self.names.numbers else "(cut off)"
        for chosen, out in self.outputs(model, examples):
            best = out.logits.argmax(-1).tolist()
            start = 0
            for i in chosen:
                firsts = examples[i].record["firsts"]
                said[i] = [
                    names[best[start + firsts[word]]] if word in firsts else nothing
                    for word in range(len(examples[i].record["words"]))
                ]
                start += examples[i].tokens
        truth = [example.record["tags"] for example in examples]
        wrong, predictions = [], []
        counts = np.zeros((len(names), len(names)), dtype=int)
        for example, right, predicted in zip(examples, truth, said, strict=True):
            words = example.record["words"]
            predictions.append({"tokens": words, "tags": right, "predicted": predicted})
            pairs = zip(words, right, predicted, strict=True)
            missed = [f"{w}: {r} as {p}" for w, r, p in pairs if r not in (None, p)]
            if missed:
                wrong.append((len(missed), {"text": shown(" ".join(words)), "wrong": shown("; ".join(missed))}))
            for r, p in zip(right, predicted, strict=True):
                if r is not None and p in self.names.numbers:
                    counts[self.names.numbers[r], self.names.numbers[p]] += 1
        counted = [[tag is not None for tag in tags] for tags in truth]
        said = [list(compress(*pair)) for pair in zip(said, counted, strict=True)]
        truth = [list(compress(*pair)) for pair in zip(truth, counted, strict=True)]
        if self.has_entities:
            figures = entity_figures(truth, said)
        else:
            flat = [[tag for tags in side for tag in tags] for side in (truth, said)]
            figures = {"accuracy": sum(r == p for r, p in zip(*flat, strict=True)) / len(flat[0])}
        return Evaluation(figures, names, counts.tolist(), worst(wrong), predictions)
