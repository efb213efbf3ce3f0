"""Text to ids and back, on the `tokenizers` library: one class for every `tokenizer.json`."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Backend

from modernbert.checks import Limits, check_value
from modernbert.errors import InputError, listed, printable, shown
from modernbert.io.files import parse_json, write_text
from modernbert.io.hub import Saved, Source
from modernbert.text.encoding import (
    UNLIMITED,
    BatchEncoding,
    pad_rows,
    rows_of,
    to_list,
    to_tensors,
    truncation_of,
)

logger = logging.getLogger(__name__)

SPECIAL_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_USUAL = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
_SPACE_BEFORE_MARK = re.compile(r" (?=[.?!,]|n't|'(?:m|s|ve|re))")
_PADDINGS = ("longest", "max_length", "do_not_pad")
_ADDITIONAL = ("additional_special_tokens", "extra_special_tokens")  # of two generations of files
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MOST_GROWTH = 1024  # how many times longer a tokenizer.json may make a text


class Tokenizer(Saved):
    """Turns texts into ids as a checkpoint's `tokenizer.json` says.

    Args:
        backend: a `tokenizers.Tokenizer`.
        config: content of `tokenizer_config.json`: special tokens, `model_max_length`, `padding_side`,
            `truncation_side`. Tokens that it names and the vocabulary lacks are added: those of
            `added_tokens_decoder` first, then special tokens, then `additional_special_tokens`. Special tokens it
            does not name are the usual ones, where the vocabulary has them.
        add_prefix_space: whether a text, and each word of a text that is split already, begins as if after a
            space; None leaves it as the file says.

    Raises:
        InputError: the configuration holds an impossible value.

    Source: the reference's tokenizer surface; ids are those of the `tokenizers` library.
    """

    def __init__(
        self, backend: Backend, config: Mapping[str, Any] | None = None, add_prefix_space: bool | None = None
    ) -> None:
        self.backend = backend
        self.config: dict[str, Any] = dict(config or {})
        self._lock = threading.Lock()  # truncation is a setting of the backend, not of a call
        backend.no_padding()
        backend.no_truncation()
        longest = self.config.get("model_max_length") or UNLIMITED  # which some files write as 1e30
        self.model_max_length: int = check_value("model_max_length", longest, int, {"limits": Limits(1)})
        sides = {name: self.config.get(name) or "right" for name in ("padding_side", "truncation_side")}
        self.padding_side, self.truncation_side = (_side(name, value) for name, value in sides.items())
        names = self.config.get("model_input_names") or ["input_ids", "attention_mask"]
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise InputError(f"model_input_names is {shown(names)}; it must be a list of names")
        self.model_input_names: list[str] = list(names)
        if add_prefix_space is not None:
            if not hasattr(backend.pre_tokenizer, "add_prefix_space"):
                raise InputError("add_prefix_space is given, and this tokenizer.json has no setting of that name")
            backend.pre_tokenizer.add_prefix_space = add_prefix_space
            self.config["add_prefix_space"] = add_prefix_space
        self._specials: dict[str, str] = {}
        self._additional: list[str] = []
        self._add_configured()

    def _add_configured(self) -> None:
        """Add the tokens that the configuration names, in the order that gives them transformers' ids."""
        declared = self.config.get("added_tokens_decoder") or {}
        if not isinstance(declared, dict) or not all(str(i).isdecimal() for i in declared):
            raise InputError(f"added_tokens_decoder is {shown(declared)}; it must hold tokens by their ids")
        added = [_token(f"added_tokens_decoder[{i}]", declared[i]) for i in sorted(declared, key=int)]
        for name in SPECIAL_NAMES:
            value = self.config.get(f"{name}_token")
            if value is not None:
                added.append(_token(f"{name}_token", value, special=True))
                self._specials[name] = added[-1].content
            elif f"{name}_token" not in self.config and self.backend.token_to_id(_USUAL.get(name, "")) is not None:
                self._specials[name] = _USUAL[name]
        for name in _ADDITIONAL:
            values = self.config.get(name) or []
            if not isinstance(values, list | tuple | dict):
                raise InputError(f"{name} is {shown(values)}; it must be a list of tokens")
            tokens = values.values() if isinstance(values, dict) else values
            more = [_token(name, value, special=True) for value in tokens]
            self._additional += [t.content for t in more if t.content not in self._additional]
            added += more
        self.config = {name: value for name, value in self.config.items() if name not in _ADDITIONAL}
        known = {token.content: token for token in self.backend.get_added_tokens_decoder().values()}
        for i, token in enumerate(added):
            if token.content not in known or (i < len(declared) and token != known[token.content]):
                known[token.content] = token
                named = token.content in self._specials.values() or token.content in self._additional
                self.add_tokens(token, special_tokens=token.special or named)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, add_prefix_space: bool | None = None, **kwargs: Any
    ) -> Self:
        """Read `tokenizer.json`, and `tokenizer_config.json` where there is one, from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: a folder, or a repository id such as "answerdotai/ModernBERT-base".
            add_prefix_space: see the class.
            kwargs: `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only`; the rest replaces entries
                of `tokenizer_config.json`.

        Raises:
            NotFoundError: there is no such folder, repository or file.
            CheckpointError, InputError: a file is malformed, or holds an impossible value.
        """
        source = Source.pop_from(pretrained_model_name_or_path, kwargs)
        path = source.need("tokenizer.json")
        config = source.read_json("tokenizer_config.json") if source.find("tokenizer_config.json") else {}
        if "added_tokens_decoder" not in config:  # as folders of the first releases have it
            config |= source.read_json("special_tokens_map.json") if source.find("special_tokens_map.json") else {}
            if source.find("added_tokens.json"):
                config["added_tokens_decoder"] = _by_id(source.read_json("added_tokens.json"))
        with _explained(f"{path} is not a tokenizer"):
            backend = Backend.from_file(str(path))
            _check_growth(path, backend)
        return cls(backend, {**config, **kwargs}, add_prefix_space)

    def _write(self, folder: Path, options: Mapping[str, Any]) -> list[Path]:
        config = {
            **self.config,
            **{f"{name}_token": token for name, token in self._specials.items()},
            **({_ADDITIONAL[0]: self._additional} if self._additional else {}),
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "model_input_names": self.model_input_names,
        }
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        config.setdefault("clean_up_tokenization_spaces", False)
        with self._lock:
            self.backend.no_truncation()
            text = self.backend.to_str(pretty=True)
        write_text(folder / "tokenizer.json", text)
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        return [folder / "tokenizer_config.json", folder / "tokenizer.json"]

    def __getstate__(self) -> dict[str, Any]:  # for copies and other processes: a lock is not copied
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    # Vocabulary

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Number of ids before tokens were added; `len(tokenizer)` counts those too."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        """Ids by token, added ones included."""
        return self.backend.get_vocab(with_added_tokens=True)

    def __getattr__(self, name: str) -> Any:
        # cls_token, cls_token_id, mask_token, ...: None where the tokenizer has no such token.
        base, _, kind = name.partition("_token")
        if base in SPECIAL_NAMES and kind in ("", "_id"):
            token = self._specials.get(base)
            return self.backend.token_to_id(token) if kind and token else token
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name.removesuffix("_token") in SPECIAL_NAMES and value is not None:
            self.add_special_tokens({name: value})
        else:
            super().__setattr__(name, value)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens by name, such as "cls_token"."""
        return {f"{name}_token": token for name, token in self._specials.items()}

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, each once: those with a name, then the additional ones."""
        return list(dict.fromkeys([*self._specials.values(), *self._additional]))

    @property
    def additional_special_tokens(self) -> list[str]:
        """The special tokens that have no name of their own."""
        return list(self._additional)

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the special tokens."""
        return [i for i in map(self.backend.token_to_id, self.all_special_tokens) if i is not None]

    def add_tokens(
        self, new_tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False
    ) -> int:
        """Add tokens that are not in the vocabulary and return how many are new; then resize the model."""
        tokens = [new_tokens] if isinstance(new_tokens, str | AddedToken) else list(new_tokens)
        return self.backend.add_special_tokens(tokens) if special_tokens else self.backend.add_tokens(tokens)

    def add_special_tokens(self, special_tokens: Mapping[str, Any]) -> int:
        """Name special tokens and add those that are new to the vocabulary; then resize the model.

        Args:
            special_tokens: tokens by name, as {"mask_token": "[MASK]"}; "additional_special_tokens" is a list of more.

        Returns:
            How many are new.

        Raises:
            InputError: there is no such name, or a token is no text.
        """
        specials, additional = {}, []
        for name, given in special_tokens.items():
            if name in _ADDITIONAL and isinstance(given, list | tuple):
                additional += [_token(name, token, special=True) for token in given]
            elif name.removesuffix("_token") in SPECIAL_NAMES:
                specials[name.removesuffix("_token")] = _token(name, given, special=True)
            else:
                names = [*(f"{known}_token" for known in SPECIAL_NAMES), _ADDITIONAL[0]]
                raise InputError(f"{shown(name)} is no special token; there are {', '.join(names)}")
        added = self.add_tokens([*specials.values(), *additional], special_tokens=True)
        self._specials.update({name: token.content for name, token in specials.items()})
        self._additional += [t.content for t in additional if t.content not in self._additional]
        return added

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Id of a token, or ids of a list of them; unknown ones are the unknown token's."""
        if isinstance(tokens, str):
            found = self.backend.token_to_id(tokens)
            return self.unk_token_id if found is None else found
        if not isinstance(tokens, list | tuple):
            raise InputError(f"tokens is {shown(tokens)}; give a token or a list of them")
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Token of an id, or tokens of a list or tensor of them."""
        values = to_list(ids)
        with _ids_checked(values):
            if isinstance(values, int):
                return self.backend.id_to_token(values)
            hidden = set(self.all_special_ids) if skip_special_tokens else set()
            return [self.backend.id_to_token(i) for i in values if i not in hidden]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Text of tokens as the vocabulary spells them."""
        decoder = self.backend.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(list(tokens)))

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many special tokens are put around a text or a pair."""
        return self.backend.num_special_tokens_to_add(pair)

    # Text to ids

    def tokenize(self, text: str) -> list[str]:
        """Tokens of a text, without special ones."""
        return list(self._encode([text], False, None)[0].tokens)

    def encode(self, text: Any, text_pair: Any = None, **kwargs: Any) -> list[int]:
        """Ids of one text or pair; for the arguments see a call."""
        return self(text, text_pair, **kwargs).input_ids

    def __call__(
        self,
        text: Any,
        text_pair: Any = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
        return_token_type_ids: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
    ) -> BatchEncoding:
        """Tokenize a text, a pair, or a batch of either.

        Args:
            text: a string; a list of them is a batch. With `is_split_into_words` a list of words, and a list of
                such lists is a batch.
            text_pair: second texts, of the same form.
            add_special_tokens: put `[CLS]` and `[SEP]` around.
            padding: True or "longest" pads to the longest row, "max_length" to `max_length`.
            truncation: True or "longest_first", "only_first", "only_second": how texts over `max_length` are cut. False
                leaves them as they are; so does None, with a warning of texts over the model's context.
            max_length: in tokens, special ones included; None is `model_max_length`.
            stride: tokens that an overflowing part shares with the part before it.
            is_split_into_words: texts are lists of words.
            pad_to_multiple_of: round the padded length up to this.
            padding_side: "left" or "right" instead of the tokenizer's own.
            return_tensors: "pt" or "np"; rows must then be equally long. None returns lists.
            return_attention_mask, return_token_type_ids, return_special_tokens_mask, return_offsets_mapping,
                return_length: what else to return.
            return_overflowing_tokens: return what truncation cuts as rows of their own, and
                `overflow_to_sample_mapping`, the number of the text that each row is of.

        Raises:
            InputError: texts of the wrong form, contradictory options, or rows that make no tensor.
        """
        batched, inputs = rows_of(text, text_pair, is_split_into_words)
        if stride < 0:
            raise InputError(f"stride is {stride}; it must not be negative")
        strategy, limit = truncation_of(padding, truncation, max_length, self.model_max_length, text_pair is not None)
        cut = (strategy, limit or 0, stride) if strategy else None
        rows = self._encode(inputs, add_special_tokens, cut, is_split_into_words)
        if return_overflowing_tokens:
            sample = [i for i, encoding in enumerate(rows) for _ in range(1 + len(encoding.overflowing))]
            rows = [row for encoding in rows for row in (encoding, *encoding.overflowing)]
        if return_token_type_ids is None:
            return_token_type_ids = "token_type_ids" in self.model_input_names
        data: dict[str, list[Any]] = {"input_ids": [e.ids for e in rows]}
        for wanted, name, attribute in (
            (return_token_type_ids, "token_type_ids", "type_ids"),
            (return_attention_mask, "attention_mask", "attention_mask"),
            (return_special_tokens_mask, "special_tokens_mask", "special_tokens_mask"),
            (return_offsets_mapping, "offset_mapping", "offsets"),
        ):
            if wanted:
                data[name] = [getattr(e, attribute) for e in rows]
        if return_length:
            data["length"] = [len(e.ids) for e in rows]
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = sample
        longest, known = max((len(e.ids) for e in rows), default=0), self.model_max_length
        if truncation is None and not strategy and longest > known:
            logger.warning("a text has %d tokens and the model's context %d; truncation=True cuts it", longest, known)
        padded = self.pad(
            data,
            padding=padding,
            max_length=limit if limit is not None else max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
        )
        if not batched and return_tensors is None and not return_overflowing_tokens:
            padded = BatchEncoding({name: value[0] for name, value in padded.items()})
        padded.encodings, padded.pad_token = rows, self.pad_token
        padded.pad_id, padded.padding_side = self.pad_token_id, padding_side or self.padding_side
        return to_tensors(padded, return_tensors)

    def _encode(
        self, inputs: list[Any], add_special_tokens: bool, truncation: tuple[str, int, int] | None, words: bool = False
    ) -> list[Encoding]:
        options = "" if truncation is None else f" with truncation, max_length and stride {truncation}"
        with self._lock, _explained(f"a text cannot be tokenized{options}"):
            if truncation is None:
                self.backend.no_truncation()
            else:
                strategy, limit, stride = truncation
                side = self.truncation_side
                self.backend.enable_truncation(limit, stride=stride, strategy=strategy, direction=side)
            return self.backend.encode_batch(inputs, is_pretokenized=words, add_special_tokens=add_special_tokens)

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
    ) -> BatchEncoding:
        """Pad rows to one length.

        Args:
            encoded_inputs: a dict of lists of rows, or a list of dicts with a row each; "input_ids" is needed, and
                "labels" are padded with -100.
            padding, max_length, pad_to_multiple_of, padding_side, return_tensors, return_attention_mask: see a
                call.

        Raises:
            InputError: an option is impossible, or there is no padding token.
        """
        if not isinstance(encoded_inputs, Mapping):
            rows = encoded_inputs if isinstance(encoded_inputs, list | tuple) else ()
            if not rows or not all(isinstance(row, Mapping) and rows[0].keys() <= row.keys() for row in rows):
                raise InputError("encoded_inputs must be a dict of rows, or a list of dicts that have the same keys")
            encoded_inputs = {name: [row[name] for row in encoded_inputs] for name in encoded_inputs[0]}
        data: dict[str, Any] = {name: list(to_list(values)) for name, values in encoded_inputs.items()}
        if "input_ids" not in data:
            raise InputError(f"there is nothing to pad by: input_ids is missing among {', '.join(data) or 'no keys'}")
        strategy = padding if not isinstance(padding, bool) else "longest" if padding else "do_not_pad"
        side = _side("padding_side", padding_side or self.padding_side)
        if strategy not in _PADDINGS:
            raise InputError(f"padding is {padding!r}; choose True, False or one of {', '.join(_PADDINGS)}")
        lengths = [len(row) for row in data["input_ids"]]
        if strategy != "do_not_pad" and lengths:
            if self.pad_token_id is None:
                raise InputError("there is no padding token; name one: add_special_tokens({'pad_token': ...})")
            if strategy == "max_length":
                target = self.model_max_length if max_length is None else max_length
                if target >= UNLIMITED:
                    raise InputError("padding is 'max_length', which needs max_length")
            else:
                target = max(lengths)
            if pad_to_multiple_of:
                target = -(-target // pad_to_multiple_of) * pad_to_multiple_of
            if return_attention_mask:
                data.setdefault("attention_mask", [[1] * n for n in lengths])
            pad_rows(data, target, self.pad_token_id, side)
        return to_tensors(BatchEncoding(data), return_tensors)

    # Ids to text

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> Any:
        """Text of ids: a number, a list or a tensor; rows of ids give a list of texts.

        Args:
            token_ids: the ids.
            skip_special_tokens: leave special tokens out.
            clean_up_tokenization_spaces: take out the space before punctuation; byte-level tokens need none of
                that, so it happens only when asked for.
        """
        values = to_list(token_ids)
        if isinstance(values, int):
            values = [values]
        if values and isinstance(values[0], list):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in values]
        with _ids_checked(values):
            text = self.backend.decode(values, skip_special_tokens=skip_special_tokens)
        return _SPACE_BEFORE_MARK.sub("", text) if clean_up_tokenization_spaces else text

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """Texts of several rows of ids."""
        return [self.decode(row, skip_special_tokens, **kwargs) for row in sequences]


# The names that code written for transformers imports.
PreTrainedTokenizer = PreTrainedTokenizerBase = PreTrainedTokenizerFast = Tokenizer


def _side(name: str, value: Any) -> str:
    if value not in ("left", "right"):
        raise InputError(f"{name} is {shown(value)}; choose left or right")
    return str(value)


def _token(where: str, value: Any, special: bool = False) -> AddedToken:
    """A token as files and callers write it: its text, or an object with its "content"."""
    if isinstance(value, AddedToken):
        return value
    content = value.get("content") if isinstance(value, Mapping) else value
    if not isinstance(content, str) or not content or re.search("[\ud800-\udfff]", content):
        raise InputError(f"{where} is {shown(value)}; it must be a text, or an object whose content is one")
    given = value if isinstance(value, Mapping) else {"normalized": not special}
    flags = {name: bool(given[name]) for name in _FLAGS if given.get(name) is not None}
    return AddedToken(content, **{**({"special": True, "normalized": False} if special else {}), **flags})


def _by_id(ids: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens by their ids, from ids by their tokens as `added_tokens.json` has them."""
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids.values()):
        raise InputError(f"added_tokens.json holds {shown(dict(ids))}; it must hold ids by their tokens")
    return {str(i): token for token, i in ids.items()}


def _check_growth(path: Path, backend: Backend) -> None:
    """Refuse a `tokenizer.json` that makes texts grow without measure, before a text fills the memory."""
    for part, key in (("normalizer", "normalizers"), ("decoder", "decoders")):
        found = getattr(backend, part)
        growth = 1 if found is None else _growth(parse_json(found.__getstate__()), key)
        if growth > _MOST_GROWTH:
            raise InputError(f"{path}: its {part} can make a text {growth:,} times longer; at most {_MOST_GROWTH:,}")


def _growth(part: Any, key: str) -> int:
    """How many times longer a normalizer or decoder can make a text by replacing."""
    if not isinstance(part, dict):
        return 1
    if isinstance(inner := part.get(key), list):
        return functools.reduce(lambda growth, one: min(growth * _growth(one, key), 10**12), inner, 1)
    content = part.get("content")
    return 1 + len(content) if part.get("type") == "Replace" and isinstance(content, str) and len(content) > 1 else 1


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """The library's errors as `InputError`: it raises bare exceptions, and panics that are no `Exception` at all."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what}: {printable(str(error), limit=200)}") from error


@contextlib.contextmanager
def _ids_checked(ids: Any) -> Iterator[None]:
    """Name what is no id, where the library finds such."""
    try:
        yield
    except (OverflowError, TypeError):
        values = ids if isinstance(ids, list) else [ids]
        wrong = [i for i in values if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < 2**32]
        raise InputError(f"ids hold {listed(map(shown, wrong))}; ids are whole numbers from 0 to {2**32 - 1}") from None
