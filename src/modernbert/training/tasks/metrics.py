"""Metrics as each field computes them: scikit-learn's, seqeval's, SQuAD's."""

from __future__ import annotations

import collections
import math
import re
import string
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from modernbert.errors import InputError


def _sklearn() -> Any:
    try:
        import sklearn.metrics
    except ImportError as error:
        raise InputError("evaluation needs scikit-learn: pip install 'modernbert[train]'") from error
    return sklearn.metrics


def classification_figures(truth: Any, predicted: Any, classes: int) -> tuple[dict[str, float], list[list[int]]]:
    """Accuracy, macro F1 over the classes that occur, Matthews' correlation; and the confusion matrix."""
    metrics = _sklearn()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single class, where the correlation is 0
        figures = {
            "accuracy": float(metrics.accuracy_score(truth, predicted)),
            "f1_macro": float(metrics.f1_score(truth, predicted, average="macro", zero_division=0)),
            "matthews": float(metrics.matthews_corrcoef(truth, predicted)),
        }
    return figures, metrics.confusion_matrix(truth, predicted, labels=range(classes)).tolist()


def multi_label_figures(truth: Any, predicted: Any, scores: Any) -> dict[str, float]:
    """F1 over all labels together and as the mean of the labels; texts with every label right; mean precision."""
    metrics = _sklearn()
    seen = truth.any(0)
    return {
        "f1_micro": float(metrics.f1_score(truth, predicted, average="micro", zero_division=0)),
        "f1_macro": float(metrics.f1_score(truth, predicted, average="macro", zero_division=0)),
        "exact": float(metrics.accuracy_score(truth, predicted)),
        "average_precision": float(metrics.average_precision_score(truth[:, seen], scores[:, seen], average="macro")),
    }


def regression_figures(truth: Any, predicted: Any) -> dict[str, float]:
    """Pearson's and Spearman's correlation, mean squared and mean absolute error."""
    from scipy import stats

    metrics = _sklearn()
    flat = bool(np.ptp(truth) == 0 or np.ptp(predicted) == 0)  # a correlation with a constant is not defined
    return {
        "pearson": 0.0 if flat else float(stats.pearsonr(truth, predicted).statistic),
        "spearman": 0.0 if flat else float(stats.spearmanr(truth, predicted).statistic),
        "mse": float(metrics.mean_squared_error(truth, predicted)),
        "mae": float(metrics.mean_absolute_error(truth, predicted)),
    }


def entity_figures(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole entities as CoNLL counts them, and the accuracy of tags."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own packaging
            from seqeval import metrics
    except ImportError as error:
        raise InputError("evaluation needs seqeval: pip install 'modernbert[train]'") from error
    right, said = [list(tags) for tags in truth], [list(tags) for tags in predicted]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tags that are not in any scheme, and types that never occur
        return {
            "f1": float(metrics.f1_score(right, said, zero_division=0)),
            "precision": float(metrics.precision_score(right, said, zero_division=0)),
            "recall": float(metrics.recall_score(right, said, zero_division=0)),
            "accuracy": float(metrics.accuracy_score(right, said)),
        }


def squad_figures(answers: Sequence[Sequence[str]], predicted: Sequence[str]) -> dict[str, float]:
    """Exact match and F1 in per cent, the best over each question's answers; no answer is [""].

    Source: the evaluation of SQuAD, arXiv:1606.05250 and arXiv:1806.03822.
    """
    exact, f1 = [], []
    for right, said in zip(answers, predicted, strict=True):
        words = _normal(said).split()
        bags = [_normal(one).split() for one in right or [""]]
        exact.append(max(float(words == bag) for bag in bags))
        f1.append(max(_overlap(words, bag) for bag in bags))
    return {"exact_match": 100 * math.fsum(exact) / len(exact), "f1": 100 * math.fsum(f1) / len(f1)}


def _normal(text: str) -> str:
    """Without case, punctuation, articles and more than single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _overlap(said: list[str], right: list[str]) -> float:
    """F1 of two bags of words; two empty ones agree."""
    if not said or not right:
        return float(said == right)
    shared = sum((collections.Counter(said) & collections.Counter(right)).values())
    return 2 * shared / (len(said) + len(right))


def retrieval_figures(ranks: Sequence[int]) -> dict[str, float]:
    """Recall at 1 and 10, and the mean reciprocal rank, of the ranks (from 1) of right answers."""
    found = np.array(ranks, dtype=np.float64)
    return {
        "recall_at_1": float((found <= 1).mean()),
        "recall_at_10": float((found <= 10).mean()),
        "mrr": float((1 / found).mean()),
    }
