"""What a tokenizer takes and gives, as lists and tensors: batches of rows, with words and characters behind them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from tokenizers import Encoding

from modernbert.checks import Limits, check_value
from modernbert.errors import InputError, shown

logger = logging.getLogger(__name__)

TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")
UNLIMITED = int(1e30)  # how tokenizer files say that texts may be of any length
# What a padded place holds, by the key of the output.
_FILL = {"attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1, "offset_mapping": (0, 0), "labels": -100}


class CharSpan(NamedTuple):
    """Characters of a text, the end not included."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens of a row, the end not included."""

    start: int
    end: int


class BatchEncoding(dict[str, Any]):
    """What a tokenizer returns: a dict whose values are also attributes.

    Args:
        data: lists or tensors by name.
        encoding: the `tokenizers` encoding behind them, or a list with one a row, where there are any.
        tensor_type: "pt" or "np" makes tensors of the lists.
        prepend_batch_axis: put each value in a batch of one.

    `batch[name]` is a value, `batch[i]` the `tokenizers` encoding of row i, padding included, and `batch[i:j]` a list
    of such; of a batch that was not made from text, a dict of those rows of each value.

    Methods that take a place take the number of the row before it, or the place alone, which means the first row.
    """

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        encoding: Encoding | Sequence[Encoding] | None = None,
        tensor_type: Any = None,
        prepend_batch_axis: bool = False,
    ) -> None:
        super().__init__(data or {})
        self.encodings = [encoding] if isinstance(encoding, Encoding) else encoding
        self.pad_token: str | None = None  # what `tokens` gives at padding
        self.pad_id: int | None = None
        self.padding_side = "right"
        if tensor_type is not None:
            self.convert_to_tensors(tensor_type, prepend_batch_axis)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        if isinstance(key, slice) and self.encodings is None:
            return {name: value[key] for name, value in self.items()}
        if isinstance(key, slice):
            return [self[row] for row in range(*key.indices(len(self.encodings or ())))]
        if not isinstance(key, int):
            raise KeyError(key)
        return self._encoding(key)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the encoding holds {', '.join(self)}; not {name!r}") from None

    def copy(self) -> Self:
        """A copy that holds the same values."""
        return copy.copy(self)

    @property
    def data(self) -> Self:
        """The dict of the values, which is the encoding itself."""
        return self

    @property
    def is_fast(self) -> bool:
        """Whether words and characters are known, as they are of what was made from text."""
        return self.encodings is not None

    @property
    def n_sequences(self) -> int | None:
        """1 for texts, 2 for pairs; None for what was not made from text."""
        return self.encodings[0].n_sequences if self.encodings else None

    def to(self, device: Any, *, non_blocking: bool = False) -> Self:
        """Move the tensors to a device, in place, and return this encoding; ids keep their dtype."""
        if isinstance(device, torch.dtype):
            logger.warning("an encoding is not cast to %s: ids are whole numbers", device)
            return self
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                self[name] = value.to(device, non_blocking=non_blocking)
        return self

    def convert_to_tensors(self, tensor_type: Any = None, prepend_batch_axis: bool = False) -> Self:
        """Make tensors of the values, in place, and return this encoding; for the arguments see the class."""
        if prepend_batch_axis and tensor_type is not None:
            self.update({name: [value] for name, value in self.items()})
        to_tensors(self, tensor_type)
        return self

    def _encoding(self, row: int) -> Encoding:
        """The encoding of a row, padded as the row is."""
        if self.encodings is None:
            raise InputError("this batch was not made from text, so it knows neither words nor characters")
        if not -len(self.encodings) <= row < len(self.encodings):
            raise IndexError(f"row is {row}; the batch has {len(self.encodings)} rows")
        encoding, ids = self.encodings[row], self.get("input_ids", ())
        if len(ids) and self.pad_id is not None:
            length = len(ids) if isinstance(to_list(ids[0]), int) else len(ids[row])
            if length > len(encoding.ids):
                encoding.pad(length, direction=self.padding_side, pad_id=self.pad_id, pad_token=self.pad_token or "")
        return encoding

    def tokens(self, batch_index: int = 0) -> list[str]:
        """Tokens of a row, padding included."""
        return list(self._encoding(batch_index).tokens)

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row the number of its word, None for special tokens and padding."""
        return list(self._encoding(batch_index).word_ids)

    words = word_ids

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row 0 or 1, the text of a pair it is from; None for special tokens and padding."""
        return list(self._encoding(batch_index).sequence_ids)

    def _at(self, method: str, what: str, first: int, second: int | None, *more: int) -> Any:
        """What the encoding of a row says of a place; None if there is no such place."""
        row, place = (0, first) if second is None else (first, second)
        for name, value in (("row", row), (what, place)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise InputError(f"{name} is {shown(value)}; it must be a whole number")
        encoding = self._encoding(row)
        if what == "token":
            place += len(encoding.ids) * (place < 0)
        if place < 0:
            raise InputError(f"{what} is {place}; it must not be negative")
        return getattr(encoding, method)(place, *more)

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """0 or 1, the text of a pair that a token is from; None for special tokens and padding."""
        return self._at("token_to_sequence", "token", batch_or_token_index, token_index)

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """Number of a token's word in its text."""
        return self._at("token_to_word", "token", batch_or_token_index, token_index)

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        """Characters of a token in its text."""
        found = self._at("token_to_chars", "token", batch_or_token_index, token_index)
        return None if found is None else CharSpan(*found)

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """Tokens of a word of a text."""
        found = self._at("word_to_tokens", "word", batch_or_word_index, word_index, sequence_index)
        return None if found is None else TokenSpan(*found)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        """Characters of a word of a text."""
        found = self._at("word_to_chars", "word", batch_or_word_index, word_index, sequence_index)
        return None if found is None else CharSpan(*found)

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The token that a character of a text is in; None for a space between tokens."""
        return self._at("char_to_token", "char", batch_or_char_index, char_index, sequence_index)

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The word that a character of a text is in."""
        return self._at("char_to_word", "char", batch_or_char_index, char_index, sequence_index)


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
    truncation = getattr(truncation, "value", truncation)  # of transformers' enumeration
    if truncation in (None, False, "do_not_truncate"):
        return None, None
    strategy = "longest_first" if truncation is True else str(truncation)
    if strategy not in TRUNCATIONS:
        raise InputError(f"truncation is {truncation!r}; choose True, False or one of {', '.join(TRUNCATIONS)}")
    if strategy == "only_second" and not pair:
        raise InputError("truncation is 'only_second' and there is no text_pair")
    limit = model_max_length if max_length is None else max_length
    limit = check_value("max_length", limit, int, {"limits": Limits(0)})
    return (None, None) if limit >= UNLIMITED else (strategy, limit)


def pad_rows(data: dict[str, Any], target: int, pad_id: int, side: str) -> None:
    """Fill the rows of a batch up to `target` on one side, in place; values that are no rows stay."""
    for name, fill in {**_FILL, "input_ids": pad_id}.items():
        if data.get(name) and isinstance(data[name][0], list | tuple):
            missing = [[fill] * (target - len(row)) for row in data[name]]
            pairs = zip(data[name], missing, strict=True)
            data[name] = [[*row, *gap] if side == "right" else [*gap, *row] for row, gap in pairs]


def rows_of(text: Any, text_pair: Any, words: bool) -> tuple[bool, list[Any]]:
    """Whether the input is a batch, and its texts, or pairs as tuples."""
    batched, firsts = _texts("text", text, words, text_pair is None)
    if text_pair is None:
        return batched, firsts
    also_batched, seconds = _texts("text_pair", text_pair, words, False)
    if batched != also_batched or len(firsts) != len(seconds):
        raise InputError(f"text holds {len(firsts)} texts and text_pair {len(seconds)}; they must be as many")
    return batched, list(zip(firsts, seconds, strict=True))


def _texts(name: str, given: Any, words: bool, pairs: bool) -> tuple[bool, list[Any]]:
    one = _text_of(given, words)
    if one is not None:
        return False, [one]
    wanted = "with is_split_into_words give a list of words, or of such lists" if words else "give a string or a list"
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping):
        kind = "None" if given is None else f"a {type(given).__name__}"
        raise InputError(f"{name} is {kind}; {wanted}{'' if words else ' of strings'}")
    texts: list[Any] = []
    for item in given:
        found: Any = _text_of(item, words)
        if found is None and pairs and isinstance(item, list | tuple) and len(item) == 2:
            both = tuple(_text_of(part, words) for part in item)
            found = None if None in both else both
        if found is None:
            may = ", or a pair of them in a list or tuple" if pairs else ""
            each = f"{wanted}{may}" if words else f"every text must be a string{may}"
            raise InputError(f"{name} holds a {type(item).__name__}; {each}")
        texts.append(found)
    return True, texts


def _text_of(given: Any, words: bool) -> Any:
    """A text, or the list of its words; None if it is no such thing."""
    if not words:
        return given if isinstance(given, str) else None
    return list(given) if isinstance(given, list | tuple) and all(isinstance(word, str) for word in given) else None


def to_tensors(batch: BatchEncoding, kind: Any) -> BatchEncoding:
    """Make tensors of a batch: "pt", "np", or None for none."""
    if kind is None:
        return batch
    if kind not in ("pt", "np"):
        raise InputError(f"return_tensors is {shown(kind)}; choose 'pt', 'np' or None")
    for name, value in batch.items():
        try:
            array = np.array(value)
        except ValueError:
            lengths = sorted({len(row) for row in value if hasattr(row, "__len__")})
            raise InputError(
                f"{name} has rows of {lengths} and makes no tensor; padding=True makes them equal"
            ) from None
        if array.dtype.kind not in "biuf":
            raise InputError(f"{name} is {shown(value)} and makes no tensor; take it out of the batch")
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        batch[name] = torch.from_numpy(array) if kind == "pt" else array
    return batch
