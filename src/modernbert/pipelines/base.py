"""What every pipeline does: load, tokenize, pack to a token budget, run, and give answers in order."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from modernbert.errors import InputError
from modernbert.models.base import PreTrainedModel
from modernbert.models.placement import resolve_device, resolve_dtype
from modernbert.tokenizer import Tokenizer

_LOADING = ("attn_implementation", "device_map")
_PLACES = ("revision", "subfolder", "cache_dir", "token", "local_files_only")


class Pipeline(abc.ABC):
    """A model and its tokenizer, ready for texts.

    Args:
        model: a loaded model; it is put in evaluation mode.
        tokenizer: its tokenizer.
        batch_tokens: tokens of a forward pass, all its texts together.
        batch_size: texts of a forward pass at the most; None leaves it to `batch_tokens`.
        defaults: options of the task's calls.
    """

    auto_model: ClassVar[Callable[..., PreTrainedModel]]
    options: ClassVar[tuple[str, ...]] = ()
    look_ahead: ClassVar[int] = 512  # texts that are sorted by length together

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        batch_tokens: int = 16384,
        batch_size: int | None = None,
        **defaults: Any,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        if batch_tokens < 1:
            raise InputError(f"batch_tokens is {batch_tokens}; it must be at least 1")
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be at least 1")
        self.batch_tokens, self.batch_size = batch_tokens, batch_size
        self.defaults = self._checked(defaults)

    @classmethod
    def load(cls, model: Any, tokenizer: Any = None, *, device: Any = None, dtype: Any = None, **kwargs: Any) -> Self:
        """Load what is not loaded yet, make it ready to serve, and make a pipeline of it."""
        places = {k: kwargs.pop(k) for k in _PLACES if k in kwargs}
        loading = {k: kwargs.pop(k) for k in _LOADING if k in kwargs}
        if isinstance(model, str | Path):
            tokenizer = model if tokenizer is None else tokenizer
            model = cls.auto_model(model, device=device, dtype=dtype, **places, **loading)
            model.optimize_for_inference()
        elif tokenizer is None:
            raise InputError("model is loaded already, so its tokenizer cannot be guessed; give tokenizer=")
        else:
            if loading:
                raise InputError(f"{', '.join(loading)} is for loading, and model is loaded already")
            if device is not None:
                model.to(resolve_device(device))
            if dtype is not None:
                model.to(resolve_dtype(dtype, model.dtype, model.device))
        if isinstance(tokenizer, str | Path):
            tokenizer = Tokenizer.from_pretrained(tokenizer, **places)
        return cls(model, tokenizer, **kwargs)

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """Answer one text, or a list of texts by a list, or any other iterable by an iterator."""
        if isinstance(inputs, str):
            return next(self.stream([inputs], **options))
        if isinstance(inputs, list | tuple):
            return list(self.stream(inputs, **options))
        if isinstance(inputs, Iterable):
            return self.stream(inputs, **options)
        raise InputError(f"inputs is a {type(inputs).__name__}; give a text, a list of texts or an iterable of them")

    def stream(self, texts: Iterable[str], **options: Any) -> Iterator[Any]:
        """Answers of texts, in their order, as they come; memory does not grow with the number of texts."""
        settings = {**self.defaults, **self._checked(options)}
        iterator = iter(texts)
        while window := list(itertools.islice(iterator, self.look_ahead)):
            rows = [self.prepare(text, settings) for text in window]
            answers: list[Any] = [None] * len(rows)
            for batch in self._batches([len(ids) for ids, _ in rows]):
                with torch.inference_mode():
                    answered = self.answer([rows[i] for i in batch], settings)
                for i, answer in zip(batch, answered, strict=True):
                    answers[i] = answer
            yield from answers

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Numbers of rows, long rows first, as many together as the token budget holds."""
        batch: list[int] = []
        room = self.batch_tokens
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if batch and (lengths[i] > room or len(batch) == self.batch_size):
                yield batch
                batch, room = [], self.batch_tokens
            batch.append(i)
            room -= lengths[i]
        if batch:
            yield batch

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            raise InputError(
                f"{type(self).__name__} has no option {', '.join(unknown)}; there are {', '.join(self.options)}"
            )
        return options

    def tokenize(self, text: Any) -> list[int]:
        """Ids of a text that fits the model's context.

        Raises:
            InputError: the text is no string, or too long.
        """
        if not isinstance(text, str):
            raise InputError(f"a text is a {type(text).__name__}; it must be a string")
        ids = self.tokenizer(text).input_ids
        limit = self.model.config.max_position_embeddings
        if len(ids) > limit:
            raise InputError(f"a text has {len(ids)} tokens and the model's context holds {limit}: {_short(text)!r}")
        return list(ids)

    @abc.abstractmethod
    def prepare(self, text: str, settings: dict[str, Any]) -> tuple[list[int], Any]:
        """Ids of a text, and whatever else its answer needs; raises `InputError` where it cannot be answered."""

    @abc.abstractmethod
    def answer(self, rows: list[tuple[list[int], Any]], settings: dict[str, Any]) -> list[Any]:
        """Answers of what `prepare` made of some texts."""

    def pack(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of ids end to end on the model's device, and their `cu_seqlens`."""
        ids_T = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
        starts = [0, *itertools.accumulate(len(row) for row in rows)]
        return ids_T.to(self.model.device), torch.tensor(starts, dtype=torch.int32)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
