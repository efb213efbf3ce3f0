"""Metrics as each field computes them: scikit-learn's, seqeval's, SQuAD's."""

from __future__ import annotations

import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

Metrics = dict[str, float]
Confusion = list[list[int]]  # counts of [true class][predicted class]


def classification_metrics(truth: Any, predicted: Any, classes: int) -> tuple[Metrics, Confusion]:
    """Accuracy, macro F1 over the classes that occur, Matthews' correlation; and the confusion matrix."""
    from sklearn import metrics

    with warnings.catch_warnings(action="ignore"):  # of a single class, where the correlation is 0
        found = {
            "accuracy": float(metrics.accuracy_score(truth, predicted)),
            "f1_macro": float(metrics.f1_score(truth, predicted, average="macro", zero_division=0)),
            "matthews": float(metrics.matthews_corrcoef(truth, predicted)),
        }
    return found, metrics.confusion_matrix(truth, predicted, labels=range(classes)).tolist()


def multi_label_metrics(truth: Any, predicted: Any, scores: Any) -> Metrics:
    """F1 over all labels together, F1 as the mean of the labels, texts with every label right, mean precision."""
    from sklearn import metrics

    seen = truth.any(0)
    return {
        "f1_micro": float(metrics.f1_score(truth, predicted, average="micro", zero_division=0)),
        "f1_macro": float(metrics.f1_score(truth, predicted, average="macro", zero_division=0)),
        "exact": float(metrics.accuracy_score(truth, predicted)),
        "average_precision": float(metrics.average_precision_score(truth[:, seen], scores[:, seen], average="macro")),
    }


def regression_metrics(truth: Any, predicted: Any) -> Metrics:
    """Pearson's and Spearman's correlation, mean squared and mean absolute error."""
    from scipy import stats
    from sklearn import metrics

    constant = bool(np.ptp(truth) == 0 or np.ptp(predicted) == 0)  # the correlation with a constant is not defined
    return {
        "pearson": 0.0 if constant else float(stats.pearsonr(truth, predicted).statistic),
        "spearman": 0.0 if constant else float(stats.spearmanr(truth, predicted).statistic),
        "mse": float(metrics.mean_squared_error(truth, predicted)),
        "mae": float(metrics.mean_absolute_error(truth, predicted)),
    }


def tag_metrics(
    truth: list[list[str]], predicted: list[list[str]], names: Sequence[str], has_entities: bool
) -> tuple[Metrics, Confusion]:
    """Accuracy of tags; with entities also their precision, recall and F1 as CoNLL counts them; the confusion matrix.

    Args:
        truth, predicted: tags of the words of each text.
        names: of the tags; others that were predicted are not in the matrix.
        has_entities: whether tags are those of entities, such as B-PER.
    """
    from sklearn.metrics import confusion_matrix

    with warnings.catch_warnings(action="ignore"):  # seqeval warns of its packaging and of types that never occur
        from seqeval import metrics

        found = {"accuracy": float(metrics.accuracy_score(truth, predicted))}
        if has_entities:
            scores = {"f1": metrics.f1_score, "precision": metrics.precision_score, "recall": metrics.recall_score}
            found = {name: float(of(truth, predicted, zero_division=0)) for name, of in scores.items()} | found
    words = [list(chain.from_iterable(tags)) for tags in (truth, predicted)]
    return found, confusion_matrix(*words, labels=list(names)).tolist()


def squad_metrics(answers: Sequence[Sequence[str]], predicted: Sequence[str]) -> Metrics:
    """Exact match and F1 in per cent, the best over the answers of each question; no answer is the empty one.

    Source: the evaluation of SQuAD, arXiv:1606.05250 and arXiv:1806.03822.
    """
    exact, f1 = [], []
    for right, given in zip(answers, predicted, strict=True):
        words = _words(given)
        others = [_words(answer) for answer in right or [""]]
        exact.append(float(words in others))
        f1.append(max(_overlap(Counter(words), Counter(other)) for other in others))
    return {"exact_match": 100 * math.fsum(exact) / len(exact), "f1": 100 * math.fsum(f1) / len(f1)}


def _words(text: str) -> list[str]:
    """The words of a text without case, punctuation and articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _overlap(given: Counter[str], right: Counter[str]) -> float:
    """F1 of two bags of words; two empty ones agree."""
    total = given.total() + right.total()
    return 2 * (given & right).total() / total if total else 1.0


def retrieval_metrics(ranks: Sequence[int]) -> Metrics:
    """Recall at 1 and 10, and the mean reciprocal rank, of the ranks (from 1) of right answers."""
    found = np.array(ranks, dtype=np.float64)
    return {
        "recall_at_1": float((found <= 1).mean()),
        "recall_at_10": float((found <= 10).mean()),
        "mrr": float((1 / found).mean()),
    }
