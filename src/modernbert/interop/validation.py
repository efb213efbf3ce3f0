"""How far numbers move where an object is patched, and how much faster it becomes, on a user's own texts."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modernbert.errors import InputError
from modernbert.interop.patching import links_in, models_in, patch, unpatch

Answers = list[np.ndarray[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Validation:
    """What `validate` found; `print` shows it as a table.

    Attributes:
        texts, tokens: how many there were; no tokens where the object's tokenizer is not known.
        least_cosine, mean_cosine: of each text's answer, unpatched and patched.
        largest_difference: of any two numbers.
        changed: labels that changed, texts' or tokens'; None where the answers are no scores of labels.
        labels: how many there were.
        seconds, patched_seconds: of one run over all texts, after a first one over a few.
    """

    texts: int
    tokens: int
    least_cosine: float
    mean_cosine: float
    largest_difference: float
    changed: int | None
    labels: int
    seconds: float
    patched_seconds: float

    @property
    def speedup(self) -> float:
        """How many times faster the patched object is."""
        return self.seconds / self.patched_seconds

    def __str__(self) -> str:
        of = f"{self.texts} texts" + (f", {self.tokens:,} tokens" if self.tokens else "")
        lines = [
            ("texts", of),
            ("cosine", f"least {self.least_cosine:.7f}, mean {self.mean_cosine:.7f}"),
            ("largest difference", f"{self.largest_difference:.1e}"),
        ]
        if self.changed is not None:
            lines.append(("labels that changed", f"{self.changed} of {self.labels}"))
        for name, seconds in (("unpatched", self.seconds), ("patched", self.patched_seconds)):
            rate = f", {self.tokens / seconds:,.0f} tokens/s" if self.tokens else ""
            lines.append((name, f"{seconds:.3f} s{rate}"))
        lines.append(("speedup", f"{self.speedup:.2f} times"))
        return "\n".join(f"{name:<20} {value}" for name, value in lines)


def validate(
    obj: Any,
    texts: Sequence[Any],
    call: Callable[[Any, Sequence[Any]], Any] | None = None,
    *,
    tokenizer: Any = None,
    batch_size: int = 32,
) -> Validation:
    """Run an object unpatched and patched over the same texts, and compare.

    The object is left as it was found, patched or not.

    Args:
        obj: what `patch` takes.
        texts: texts; pairs of texts for a cross-encoder.
        call: what to run, a function of the object and texts that gives numbers: arrays or tensors, one a text. By
            default `encode`, `predict`, or `predict_proba`, or a model of transformers over batches in their order.
        tokenizer: of a model of transformers; by default that of the folder which it was loaded from.
        batch_size: texts of a batch.

    Raises:
        InputError: it is not known what to run, or texts are missing.
        PatchError: the object cannot be patched.
    """
    texts = list(texts)
    if not texts:
        raise InputError("texts is empty; give some of those that the model is for")
    run, of_labels, tokenizer = _runner(obj, texts, call, tokenizer, batch_size)
    was_patched = bool(links_in(obj))
    found: dict[bool, tuple[Answers, float]] = {}
    modes = {module: module.training for module in models_in(obj)}
    try:
        for module in modes:
            module.training = False
        for patched in (was_patched, not was_patched):
            if patched != bool(links_in(obj)):
                (patch if patched else unpatch)(obj)
            run(texts[: min(len(texts), 4)])
            began = time.perf_counter()
            answers = run(texts)
            found[patched] = _arrays(answers, len(texts)), time.perf_counter() - began
    finally:
        if was_patched != bool(links_in(obj)):
            (patch if was_patched else unpatch)(obj)
        for module, training in modes.items():
            module.training = training
    (before, seconds), (after, patched_seconds) = found[False], found[True]
    cosines = [_cosine(a, b) for a, b in zip(before, after, strict=True)]
    changed = sum(int((a.argmax(-1) != b.argmax(-1)).sum()) for a, b in zip(before, after, strict=True) if a.ndim)
    return Validation(
        len(texts),
        _count(tokenizer, texts),
        min(cosines),
        float(np.mean(cosines)),
        max((float(np.abs(a - b).max()) for a, b in zip(before, after, strict=True) if a.size), default=0.0),
        changed if of_labels and any(a.ndim and a.shape[-1] > 1 for a in before) else None,
        sum(int(np.prod(a.shape[:-1])) for a in before),
        seconds,
        patched_seconds,
    )


def _runner(
    obj: Any, texts: Sequence[Any], call: Any, tokenizer: Any, batch_size: int
) -> tuple[Callable[[Sequence[Any]], Any], bool, Any]:
    """What to run, whether its numbers are scores of labels, and what counts tokens."""
    own = tokenizer if tokenizer is not None else getattr(obj, "tokenizer", None)
    if call is not None:
        return lambda some: call(obj, some), True, own
    if hasattr(obj, "predict_proba"):  # SetFit's
        return lambda some: obj.predict_proba(list(some)), True, getattr(obj.model_body, "tokenizer", None)
    if isinstance(obj, nn.Module) and hasattr(obj, "start_multi_process_pool"):  # sentence-transformers'
        scores = hasattr(obj, "predict")
        options = {"batch_size": batch_size, "show_progress_bar": False} | (
            {"convert_to_tensor": True} if scores else {}
        )
        name = "predict" if scores else "encode"
        return lambda some: getattr(obj, name)(list(some), **options), scores, own
    config = getattr(obj, "config", None)
    if not isinstance(obj, nn.Module) or config is None or not hasattr(obj, "base_model"):
        raise InputError(f"call is missing; what a {type(obj).__name__} computes of texts is not known here")
    if own is None:
        own = _tokenizer_of(obj)
    return lambda some: _states(obj, own, some, batch_size), "For" in type(obj).__name__, own


def _tokenizer_of(model: Any) -> Any:
    try:
        return sys.modules["transformers"].AutoTokenizer.from_pretrained(model.config.name_or_path)
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer is missing, and {model.config.name_or_path!r} has none; give one") from error


def _states(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int) -> list[Any]:
    """What a model of transformers gives first, of each text; of tokens the real ones."""
    found: list[Any] = []
    device = next(model.parameters()).device
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(list(texts[start : start + batch_size]), padding=True, truncation=True, return_tensors="pt")
        batch = {name: value.to(device) for name, value in batch.items() if name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            first = model(**batch)[0]
        mask = batch["attention_mask"].bool()
        by_token = first.shape[:2] == mask.shape and first.dim() == 3
        found += [row[real] if by_token else row for row, real in zip(first, mask, strict=True)]
    return found


def _arrays(answers: Any, texts: int) -> Answers:
    if isinstance(answers, Tensor) and answers.layout != torch.strided:
        answers = answers.to_dense()
    rows = [a.detach().to("cpu", torch.float64).numpy() if isinstance(a, Tensor) else np.asarray(a) for a in answers]
    if len(rows) != texts:
        raise InputError(f"call gave {len(rows)} answers; there are {texts} texts")
    return [row.astype(np.float64) for row in rows]


def _cosine(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    a, b = one.ravel(), other.ravel()
    if np.array_equal(a, b):  # zeros have no direction
        return 1.0
    if a.size < 2:  # a single score has no direction
        return 1.0 if np.allclose(a, b) else float(a.sum() * b.sum() > 0)
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-300))


def _count(tokenizer: Any, texts: Sequence[Any]) -> int:
    """Tokens of all texts, as far as the tokenizer says."""
    if tokenizer is None:
        return 0
    pairs = isinstance(texts[0], tuple | list)
    given = ([one for one, _ in texts], [other for _, other in texts]) if pairs else (list(texts),)
    return sum(map(len, tokenizer(*given, truncation=True)["input_ids"]))
