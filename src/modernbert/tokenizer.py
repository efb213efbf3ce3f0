"""Text to ids and back, on the `tokenizers` library: one class for every `tokenizer.json`."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Backend

from modernbert.encoding import UNLIMITED, BatchEncoding, pad_rows, rows_of, to_list, to_tensors, truncation_of, whole
from modernbert.errors import InputError
from modernbert.files import write_text
from modernbert.hub import Source

logger = logging.getLogger(__name__)

SPECIAL_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_USUAL = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
_SPACE_BEFORE_MARK = re.compile(r" (?=[.?!,]|n't|'(?:m|s|ve|re))")
_PADDINGS = ("longest", "max_length", "do_not_pad")
_SIDES = ("left", "right")


class Tokenizer:
    """Turns texts into ids as a checkpoint's `tokenizer.json` says.

    Args:
        backend: a `tokenizers.Tokenizer`.
        config: content of `tokenizer_config.json`: special tokens, `model_max_length`, `padding_side`,
            `truncation_side`. Special tokens it does not name are the usual ones, where the vocabulary has them.
        add_prefix_space: whether a text, and each word of a text that is split already, begins as if after a
            space; None leaves it as the file says.

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
        self.model_max_length = whole("model_max_length", self.config.get("model_max_length") or UNLIMITED)
        self.padding_side = self.config.get("padding_side", "right")
        self.truncation_side = self.config.get("truncation_side", "right")
        self.model_input_names: list[str] = self.config.get("model_input_names", ["input_ids", "attention_mask"])
        if add_prefix_space is not None:
            cast(Any, backend.pre_tokenizer).add_prefix_space = add_prefix_space
            self.config["add_prefix_space"] = add_prefix_space
        self._specials: dict[str, str] = {}
        for name in SPECIAL_NAMES:
            value = self.config.get(f"{name}_token", _USUAL.get(name))
            token = value["content"] if isinstance(value, dict) else value
            if token is not None and backend.token_to_id(token) is not None:
                self._specials[name] = token

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | Path, *, add_prefix_space: bool | None = None, **kwargs: Any
    ) -> Self:
        """Read `tokenizer.json`, and `tokenizer_config.json` where there is one, from a folder or the Hub.

        Args:
            name_or_folder: a folder, or a repository id such as "answerdotai/ModernBERT-base".
            add_prefix_space: see the class.
            kwargs: `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only`; the rest replaces entries
                of `tokenizer_config.json`.

        Raises:
            NotFoundError: there is no such folder, repository or file.
        """
        source = Source.pop_from(name_or_folder, kwargs)
        path = source.need("tokenizer.json")
        config = source.read_json("tokenizer_config.json") if source.find("tokenizer_config.json") else {}
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{path} is not a tokenizer: {error}") from error
        return cls(backend, {**config, **kwargs}, add_prefix_space)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which transformers reads too."""
        folder = Path(folder)
        config = {
            **self.config,
            **{f"{name}_token": token for name, token in self._specials.items()},
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
            return token if kind == "" or token is None else self.backend.token_to_id(token)
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
        """The special tokens, each once."""
        return list(dict.fromkeys(self._specials.values()))

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the special tokens."""
        ids = (self.backend.token_to_id(token) for token in self.all_special_tokens)
        return [i for i in ids if i is not None]

    def add_tokens(
        self, new_tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False
    ) -> int:
        """Add tokens that are not in the vocabulary and return how many are new; then resize the model."""
        tokens = [new_tokens] if isinstance(new_tokens, str | AddedToken) else list(new_tokens)
        return self.backend.add_special_tokens(tokens) if special_tokens else self.backend.add_tokens(tokens)

    def add_special_tokens(self, special_tokens: Mapping[str, str | AddedToken]) -> int:
        """Name special tokens, as {"mask_token": "[MASK]"}, and add those that are new; returns how many."""
        for name in special_tokens:
            if name.removesuffix("_token") not in SPECIAL_NAMES:
                raise InputError(
                    f"{name!r} is no special token; there are {', '.join(n + '_token' for n in SPECIAL_NAMES)}"
                )
        added = self.add_tokens(list(special_tokens.values()), special_tokens=True)
        for name, token in special_tokens.items():
            self._specials[name.removesuffix("_token")] = token if isinstance(token, str) else token.content
        return added

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Id of a token, or ids of a list of them; unknown ones are the unknown token's."""
        if isinstance(tokens, str):
            found = self.backend.token_to_id(tokens)
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Token of an id, or tokens of a list or tensor of them."""
        values = to_list(ids)
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
        """Ids of one text or pair; arguments as of a call."""
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
        encodings = self._encode(
            inputs, add_special_tokens, (strategy, limit, stride) if strategy else None, is_split_into_words
        )
        rows, sample = encodings, list(range(len(encodings)))
        if return_overflowing_tokens:
            rows, sample = [], []
            for i, encoding in enumerate(encodings):
                rows += [encoding, *encoding.overflowing]
                sample += [i] * (1 + len(encoding.overflowing))
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
        longest = max((len(e.ids) for e in rows), default=0)
        if truncation is None and not strategy and longest > self.model_max_length:
            known = self.model_max_length
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
        return to_tensors(padded, return_tensors)

    def _encode(
        self,
        inputs: list[Any],
        add_special_tokens: bool,
        truncation: tuple[str, int | None, int] | None,
        words: bool = False,
    ) -> list[Encoding]:
        with self._lock:
            try:
                if truncation is None:
                    self.backend.no_truncation()
                else:
                    strategy, limit, stride = truncation
                    side = self.truncation_side
                    self.backend.enable_truncation(limit or 0, stride=stride, strategy=strategy, direction=side)
                return self.backend.encode_batch(inputs, is_pretokenized=words, add_special_tokens=add_special_tokens)
            except Exception as error:  # the library raises bare Exception, and its panics derive from it too
                options = "" if truncation is None else f" with truncation, max_length and stride {truncation}"
                raise InputError(f"a text cannot be tokenized{options}: {error}") from error

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
            padding, max_length, pad_to_multiple_of, padding_side, return_tensors, return_attention_mask: as of a
                call.

        Raises:
            InputError: an option is impossible, or there is no padding token.
        """
        if not isinstance(encoded_inputs, Mapping):
            encoded_inputs = {name: [row[name] for row in encoded_inputs] for name in encoded_inputs[0]}
        data: dict[str, Any] = {name: list(to_list(values)) for name, values in encoded_inputs.items()}
        if "input_ids" not in data:
            raise InputError(f"there is nothing to pad by: input_ids is missing among {', '.join(data) or 'no keys'}")
        strategy = (
            {True: "longest", False: "do_not_pad"}.get(padding, padding) if isinstance(padding, bool) else padding
        )
        side = padding_side or self.padding_side
        if strategy not in _PADDINGS:
            raise InputError(f"padding is {padding!r}; choose True, False or one of {', '.join(_PADDINGS)}")
        if side not in _SIDES:
            raise InputError(f"padding_side is {side!r}; choose left or right")
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
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
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
        text = self.backend.decode(values, skip_special_tokens=skip_special_tokens)
        return _SPACE_BEFORE_MARK.sub("", text) if clean_up_tokenization_spaces else text

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """Texts of several rows of ids."""
        return [self.decode(row, skip_special_tokens, **kwargs) for row in sequences]
