"""What a tokenizer takes and gives, as lists and tensors: batches of rows, with words and characters behind them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from tokenizers import Encoding

from modernbert.errors import InputError

logger = logging.getLogger(__name__)

TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")
UNLIMITED = int(1e30)  # how tokenizer files say that texts may be of any length
# What a padded place holds, by the key of the output.
_FILL = {"attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1, "offset_mapping": (0, 0), "labels": -100}


class BatchEncoding(dict[str, Any]):
    """What a tokenizer returns: a dict whose values are also attributes.

    Args:
        data: lists or tensors by name.
        encodings: the `tokenizers` encodings behind them, one a row, where there are any.
        pad_token: what `tokens` gives at padding.

    `batch[name]` is a value, `batch[i]` the `tokenizers` encoding of row i, padding included, and `batch[i:j]` a list
    of such; of a batch that was not made from text, a dict of those rows of each value.
    """

    def __init__(
        self, data: Mapping[str, Any], encodings: Sequence[Encoding] | None = None, pad_token: str | None = None
    ) -> None:
        super().__init__(data)
        self.encodings = encodings
        self.pad_token = pad_token
        self.pad_id: int | None = None
        self.padding_side = "right"

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        if isinstance(key, slice) and self.encodings is None:
            return {name: value[key] for name, value in self.items()}
        if isinstance(key, slice):
            return [self[row] for row in range(*key.indices(len(self.encodings or ())))]
        if not isinstance(key, int):
            raise KeyError(key)
        return self._padded(self._encoding(key), key)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the encoding holds {', '.join(self)}; not {name!r}") from None

    def to(self, device: Any) -> Self:
        """Move the tensors to a device, in place, and return this encoding."""
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                self[name] = value.to(device)
        return self

    def _encoding(self, row: int) -> Encoding:
        if self.encodings is None:
            raise InputError("this batch was not made from text, so it knows neither words nor characters")
        if not -len(self.encodings) <= row < len(self.encodings):
            raise IndexError(f"row is {row}; the batch has {len(self.encodings)} rows")
        return self.encodings[row]

    def _padded(self, encoding: Encoding, row: int) -> Encoding:
        """An encoding as long as its row of the batch."""
        ids = self["input_ids"]
        length = len(ids) if len(ids) and isinstance(to_list(ids[0]), int) else len(ids[row])
        if length == len(encoding.ids) or self.pad_id is None:
            return encoding
        padded = copy.deepcopy(encoding)  # padding acts in place
        padded.pad(length, direction=self.padding_side, pad_id=self.pad_id, pad_token=self.pad_token or "")
        return padded

    def tokens(self, batch_index: int = 0) -> list[str]:
        """Tokens of a row, padding included."""
        return self._spread("tokens", batch_index, self.pad_token)

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row the number of its word, None for special tokens and padding."""
        return self._spread("word_ids", batch_index)

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row 0 or 1, the text of a pair it is from; None for special tokens and padding."""
        return self._spread("sequence_ids", batch_index)

    def _spread(self, name: str, row: int, fill: Any = None) -> list[Any]:
        """An attribute of a row's tokens, with `fill` at its padding."""
        values, mask = list(getattr(self._encoding(row), name)), self.get("attention_mask")
        if mask is None:
            return values
        rest = iter(values)
        return [
            next(rest) if real else fill for real in (mask[row] if len(mask) and not isinstance(mask[0], int) else mask)
        ]


def to_list(values: Any) -> Any:
    """A tensor or array as a list or number; anything else as it is."""
    return values.tolist() if isinstance(values, torch.Tensor | np.ndarray | np.generic) else values


def truncation_of(
    padding: bool | str, truncation: bool | str | None, max_length: int | None, model_max_length: int, pair: bool
) -> tuple[str | None, int | None]:
    """The strategy and the length to cut to, or None twice."""
    if truncation is None and max_length is not None and padding is False:
        logger.info("max_length is given without truncation; cutting texts as truncation=True does")
        truncation = True
    if truncation in (None, False, "do_not_truncate"):
        return None, None
    strategy = "longest_first" if truncation is True else str(truncation)
    if strategy not in TRUNCATIONS:
        raise InputError(f"truncation is {truncation!r}; choose True, False or one of {', '.join(TRUNCATIONS)}")
    if strategy == "only_second" and not pair:
        raise InputError("truncation is 'only_second' and there is no text_pair")
    limit = model_max_length if max_length is None else max_length
    if limit < 0:
        raise InputError(f"max_length is {max_length}; it must not be negative")
    return (None, None) if limit >= UNLIMITED else (strategy, limit)


def pad_rows(data: dict[str, Any], target: int, pad_id: int, side: str) -> None:
    """Fill the rows of a batch up to `target` on one side, in place; values that are no rows stay."""
    for name, fill in {**_FILL, "input_ids": pad_id}.items():
        if data.get(name) and isinstance(data[name][0], list | tuple):
            missing = [[fill] * (target - len(row)) for row in data[name]]
            pairs = zip(data[name], missing, strict=True)
            data[name] = [[*row, *gap] if side == "right" else [*gap, *row] for row, gap in pairs]


def rows_of(text: Any, text_pair: Any, words: bool) -> tuple[bool, list[Any]]:
    """Whether the input is a batch, and its texts or pairs as a list."""
    firsts, seconds = _texts("text", text, words), _texts("text_pair", text_pair, words)
    if firsts is None:
        raise InputError("text is None; give a string or a list of them")
    batched, first_list = firsts
    if seconds is None:
        return batched, first_list
    if batched != seconds[0] or len(first_list) != len(seconds[1]):
        raise InputError(f"text holds {len(first_list)} texts and text_pair {len(seconds[1])}; they must be as many")
    return batched, list(zip(first_list, seconds[1], strict=True))


def _texts(name: str, given: Any, words: bool) -> tuple[bool, list[Any]] | None:
    if given is None:
        return None
    if words and isinstance(given, list | tuple):
        if all(isinstance(word, str) for word in given):
            return False, [list(given)]
        if all(isinstance(text, list | tuple) and all(isinstance(word, str) for word in text) for text in given):
            return True, [list(text) for text in given]
    if words:
        wanted = "with is_split_into_words give a list of words, or of such lists"
        raise InputError(f"{name} is a {type(given).__name__}; {wanted}")
    if isinstance(given, str):
        return False, [given]
    if not isinstance(given, Iterable) or isinstance(given, bytes | Mapping):
        raise InputError(f"{name} is a {type(given).__name__}; give a string or a list of strings")
    texts = list(given)
    bad = next((text for text in texts if not isinstance(text, str)), "")
    if not isinstance(bad, str):
        raise InputError(f"{name} holds a {type(bad).__name__}; every text must be a string")
    return True, texts


def to_tensors(batch: BatchEncoding, kind: str | None) -> BatchEncoding:
    """Make tensors of a batch: "pt", "np", or None for none."""
    if kind is None:
        return batch
    if kind not in ("pt", "np"):
        raise InputError(f"return_tensors is {kind!r}; choose 'pt', 'np' or None")
    for name, value in batch.items():
        try:
            array = np.array(value)
        except ValueError:
            lengths = sorted({len(row) for row in value})
            raise InputError(
                f"{name} has rows of {lengths} and makes no tensor; padding=True makes them equal"
            ) from None
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        batch[name] = torch.from_numpy(array) if kind == "pt" else array
    return batch
