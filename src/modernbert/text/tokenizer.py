"""Text to ids and back, on the `tokenizers` library: one class for every `tokenizer.json`."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Backend

from modernbert.checks import Limits, check_value
from modernbert.errors import InputError, listed, printable, shown
from modernbert.io.files import parse_json, write_text
from modernbert.io.hub import Saved, Source
from modernbert.text.chat import before_end_of, chosen, files_of, read_templates, rendered
from modernbert.text.chat import named as named_templates
from modernbert.text.encoding import (
    UNLIMITED,
    BatchEncoding,
    pad_rows,
    rows_of,
    to_list,
    to_tensors,
    truncation_of,
)
from modernbert.text.training import trained

logger = logging.getLogger(__name__)

SPECIAL_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_USUAL = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
_SPACE_BEFORE_MARK = re.compile(r" (?=[.?!,]|n't|'(?:m|s|ve|re))| (') ")
_PADDINGS = ("longest", "max_length", "do_not_pad")
_ADDITIONAL = ("additional_special_tokens", "extra_special_tokens")  # of two generations of files
_TARGETS = ("self", "text", "text_pair", "text_target", "text_pair_target")
# Attributes that are entries of the configuration, and their values where it has none.
_SETTINGS: dict[str, Any] = {
    "chat_template": None,
    "name_or_path": "",
    "clean_up_tokenization_spaces": False,
    "split_special_tokens": False,
    "verbose": False,
}
_FIXED = ("add_bos_token", "add_eos_token", "add_prefix_space")  # what `tokenizer.json` itself says
# What callers of transformers give for loading, and what is said of it.
_TENSORS = {"pt": torch.Tensor, "np": np.ndarray}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MOST_GROWTH = 1024  # how many times longer a tokenizer.json may make a text


class Tokenizer(Saved):
    """Turns texts into ids as a checkpoint's `tokenizer.json` says.

    Args:
        backend: a `tokenizers.Tokenizer`; or give one as `tokenizer_object`, or a `tokenizer.json` as `tokenizer_file`.
        config: content of `tokenizer_config.json`: special tokens, `model_max_length`, `padding_side`,
            `truncation_side`. Tokens that it names and the vocabulary lacks are added: those of
            `added_tokens_decoder` first, then special tokens, then `additional_special_tokens`. Special tokens it
            does not name are the usual ones, where the vocabulary has them.
        add_prefix_space: whether a text, and each word of a text that is split already, begins as if after a
            space; None leaves it as the file says.
        settings: more of the configuration, such as `pad_token="[PAD]"`.

    Raises:
        InputError: the configuration holds an impossible value.

    Source: the reference's tokenizer surface; ids are those of the `tokenizers` library.
    """

    is_fast = True
    pad_token_type_id = 0
    init_inputs = ()
    SPECIAL_TOKENS_ATTRIBUTES: ClassVar[list[str]] = [f"{name}_token" for name in SPECIAL_NAMES]

    def __init__(
        self,
        backend: Backend | None = None,
        config: Mapping[str, Any] | None = None,
        add_prefix_space: bool | None = None,
        *,
        tokenizer_object: Backend | None = None,
        tokenizer_file: str | Path | None = None,
        **settings: Any,
    ) -> None:
        self._refuse_methods(settings)
        backend = tokenizer_object if backend is None else backend
        if tokenizer_file is not None and backend is None:
            with _explained(f"{tokenizer_file} is not a tokenizer"):
                backend = Backend.from_file(str(tokenizer_file))
        if not isinstance(backend, Backend):
            raise InputError(f"backend is {shown(backend)}; give a tokenizers.Tokenizer")
        self.backend = backend
        self.config: dict[str, Any] = {**(config or {}), **settings}
        self.chat_template = self.config.get("chat_template")
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
        kwargs.pop("config", None)  # a model's, which a tokenizer does not use
        for name in kwargs.keys() & _FIXED:
            _refuse_fixed(name, kwargs.pop(name))
        source = Source.pop_from(pretrained_model_name_or_path, kwargs).holding("tokenizer.json")
        cls._refuse_methods(kwargs)
        path = source.need("tokenizer.json")
        config = source.read_json("tokenizer_config.json") if source.find("tokenizer_config.json") else {}
        if "added_tokens_decoder" not in config:  # as folders of the first releases have it
            config |= source.read_json("special_tokens_map.json") if source.find("special_tokens_map.json") else {}
            if source.find("added_tokens.json"):
                config["added_tokens_decoder"] = _by_id(source.read_json("added_tokens.json"))
        if templates := read_templates(source):
            config["chat_template"] = templates
        config["name_or_path"] = str(pretrained_model_name_or_path)
        with _explained(f"{path} is not a tokenizer"):
            backend = Backend.from_file(str(path))
            _check_growth(path, backend)
        return cls(backend, {**config, **kwargs}, add_prefix_space)

    @classmethod
    def _refuse_methods(cls, settings: Iterable[str]) -> None:
        if wrong := [name for name in settings if callable(getattr(cls, name, None))]:
            raise AttributeError(f"{listed(wrong)}: a method of a tokenizer, and no setting; give it in a call")

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        filename_prefix: str | None = None,
        legacy_format: bool | None = None,
        push_to_hub: bool = False,
        save_jinja_files: bool = True,
        **kwargs: Any,
    ) -> tuple[str, ...]:
        """Write `tokenizer_config.json`, `tokenizer.json` and the chat templates, which transformers reads too.

        Args:
            save_directory: where to.
            filename_prefix: put before the files' names, with a hyphen.
            legacy_format: True, the files of slow tokenizers, is refused; `save_vocabulary` writes the vocabulary.
            push_to_hub, kwargs: upload the files as well; see `push_to_hub`.
            save_jinja_files: False keeps the chat templates in `tokenizer_config.json`.

        Returns:
            The files.

        Raises:
            InputError: a chat template has a name that no file can have.
        """
        if legacy_format:
            raise InputError("legacy_format is True; tokenizer.json is written, and save_vocabulary writes older files")
        options = {"filename_prefix": filename_prefix, "save_jinja_files": save_jinja_files}
        return self._save(save_directory, options, push_to_hub, kwargs)

    def _write(self, folder: Path, options: Mapping[str, Any]) -> list[Path]:
        config = {
            **self.init_kwargs,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "model_input_names": self.model_input_names,
        }
        prefix = f"{options['filename_prefix']}-" if options.get("filename_prefix") else ""
        templates = files_of(self.chat_template, prefix) if options.get("save_jinja_files", True) else {}
        if templates:
            config.pop("chat_template", None)
        elif isinstance(self.chat_template, Mapping):
            config["chat_template"] = [{"name": k, "template": v} for k, v in self.chat_template.items()]
        config.pop("name_or_path", None)
        if config.get("tokenizer_class") in (None, "TokenizersBackend"):  # the name in transformers 5, which reads both
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.setdefault("clean_up_tokenization_spaces", False)
        with self._lock:
            text = self.backend.to_str(pretty=True)
        files = [folder / f"{prefix}{name}.json" for name in ("tokenizer_config", "tokenizer")]
        write_text(files[0], json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_text(files[1], text)
        for name, template in templates.items():
            files.append(folder / name)
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            write_text(files[-1], template)
        return files

    def save_vocabulary(self, save_directory: str | Path, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write the vocabulary in the files of the model's own kind, such as vocab.json and merges.txt; their names."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        return tuple(self.backend.model.save(str(save_directory), filename_prefix))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, "
            f"model_max_length={self.model_max_length}, padding_side={self.padding_side!r}, "
            f"truncation_side={self.truncation_side!r}, special_tokens={self.special_tokens_map})"
        )

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

    vocab = property(get_vocab)

    @property
    def backend_tokenizer(self) -> Backend:
        """The `tokenizers.Tokenizer` that does the work."""
        return self.backend

    _tokenizer = backend_tokenizer

    @property
    def decoder(self) -> Any:
        """The part of `tokenizer.json` that makes text of tokens."""
        return self.backend.decoder

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """The configuration, with the special tokens as they are now."""
        return {
            **self.config,
            **self.special_tokens_map,
            **({_ADDITIONAL[0]: self._additional} if self._additional else {}),
        }

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The tokens that are not of the model's own vocabulary, by their ids."""
        return dict(sorted(self.backend.get_added_tokens_decoder().items()))

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """Ids of the tokens that are not of the model's own vocabulary."""
        return {token.content: i for i, token in self.added_tokens_decoder.items()}

    def get_added_vocab(self) -> dict[str, int]:
        """Ids of the tokens that are not of the model's own vocabulary."""
        return self.added_tokens_encoder

    @property
    def max_len_single_sentence(self) -> int:
        """Tokens of a text that fit `model_max_length` beside the special tokens."""
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        """Tokens of a pair that fit `model_max_length` beside the special tokens."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    @property
    def deprecation_warnings(self) -> dict[str, bool]:
        """Empty; what transformers' collators note here has no use."""
        return {}

    def __getattr__(self, name: str) -> Any:
        # cls_token, cls_token_id, mask_token, ...: None where the tokenizer has no such token.
        base, token_in_name, kind = name.partition("_token")
        if token_in_name and base in SPECIAL_NAMES and kind in ("", "_id"):
            token = self._specials.get(base)
            return self.backend.token_to_id(token) if kind and token else token
        if name in _SETTINGS:
            return self.config.get(name, _SETTINGS[name])
        if name in _FIXED:
            return bool(self.config.get(name, getattr(self.backend.pre_tokenizer, name, False)))
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        base, token_in_name, kind = name.partition("_token")
        if token_in_name and base in SPECIAL_NAMES and kind in ("", "_id"):
            if kind and value is not None:
                value = self._token_of(name, value)
            if value is None:
                self._specials.pop(base, None)
                self.config[f"{base}_token"] = None
            else:
                self.add_special_tokens({f"{base}_token": value})
        elif name in _SETTINGS:
            if (value := named_templates(value) if name == "chat_template" else value) != getattr(self, name):
                self.config[name] = value
        elif name in _FIXED:
            if value != getattr(self, name):
                _refuse_fixed(name, value)
        else:
            super().__setattr__(name, value)

    def _token_of(self, name: str, i: Any) -> str:
        token = self.backend.id_to_token(i) if isinstance(i, int) and 0 <= i < 2**32 else None
        if token is None:
            raise InputError(f"{name} is {shown(i)}; the tokenizer has ids 0 to {len(self) - 1}")
        return token

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens by name, such as "cls_token"."""
        return {f"{name}_token": self._specials[name] for name in SPECIAL_NAMES if name in self._specials}

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, each once: those with a name, then the additional ones."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self._additional]))

    @property
    def additional_special_tokens(self) -> list[str]:
        """The special tokens that have no name of their own; setting them adds those that are new."""
        return list(self._additional)

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: Sequence[Any] | None) -> None:
        self.add_special_tokens({_ADDITIONAL[0]: list(tokens or ())})

    extra_special_tokens = additional_special_tokens

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """Ids of the special tokens that have no name of their own."""
        return self.convert_tokens_to_ids(self._additional)

    @additional_special_tokens_ids.setter
    def additional_special_tokens_ids(self, ids: Sequence[int] | None) -> None:
        self.additional_special_tokens = [self._token_of("additional_special_tokens_ids", i) for i in ids or ()]

    extra_special_tokens_ids = additional_special_tokens_ids

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the special tokens."""
        return [i for i in map(self.backend.token_to_id, self.all_special_tokens) if i is not None]

    def add_tokens(
        self, new_tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False
    ) -> int:
        """Add tokens that are not in the vocabulary and return how many are new; then resize the model."""
        tokens = [new_tokens] if isinstance(new_tokens, str | AddedToken) else list(new_tokens)
        if wrong := [token for token in tokens if not isinstance(token, str | AddedToken)]:
            raise InputError(f"new_tokens holds {shown(wrong[0])}; give texts")
        return self.backend.add_special_tokens(tokens) if special_tokens else self.backend.add_tokens(tokens)

    def add_special_tokens(
        self,
        special_tokens_dict: Mapping[str, Any],
        replace_additional_special_tokens: bool = True,
        replace_extra_special_tokens: bool = True,
    ) -> int:
        """Name special tokens and add those that are new to the vocabulary; then resize the model.

        Args:
            special_tokens_dict: tokens by name, as {"mask_token": "[MASK]"}; "additional_special_tokens", or
                "extra_special_tokens", is a list of more.
            replace_additional_special_tokens, replace_extra_special_tokens: whether this list takes the place of the
                one before, whose tokens stay in the vocabulary; else it is added to it.

        Returns:
            How many are new.

        Raises:
            InputError: there is no such name, or a token is no text.
        """
        names = [*(f"{known}_token" for known in SPECIAL_NAMES), _ADDITIONAL[0]]
        if not isinstance(special_tokens_dict, Mapping):
            raise InputError(f"special_tokens_dict is {shown(special_tokens_dict)}; give a dict of {', '.join(names)}")
        found: dict[str, list[AddedToken]] = {}
        for name, given in special_tokens_dict.items():
            if name in _ADDITIONAL and not isinstance(given, list | tuple):
                raise InputError(f"{name} is {shown(given)}; give a list of tokens")
            if name not in (*names, *_ADDITIONAL):
                raise InputError(f"{shown(name)} is no special token; there are {', '.join(names)}")
            found[name] = [_token(name, one, special=True) for one in (given if name in _ADDITIONAL else [given])]
        added = self.add_tokens([token for tokens in found.values() for token in tokens], special_tokens=True)
        if found.keys() & set(_ADDITIONAL) and replace_additional_special_tokens and replace_extra_special_tokens:
            self._additional = []
        for name, tokens in found.items():
            if name in _ADDITIONAL:
                self._additional = list(dict.fromkeys([*self._additional, *(token.content for token in tokens)]))
            else:
                self._specials[name.removesuffix("_token")] = tokens[0].content
        return added

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """Id of a token, or ids of a list of them; unknown ones are the unknown token's."""
        if isinstance(tokens, str):
            found = self.backend.token_to_id(tokens)
            return self.unk_token_id if found is None else found
        if not isinstance(tokens, Iterable):
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

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """Tokens of a text or a pair, without special ones by default; options are those of a call."""
        return self(text, pair, add_special_tokens=add_special_tokens, **{"truncation": False, **options}).tokens()

    def encode(self, text: Any, text_pair: Any = None, **kwargs: Any) -> list[int]:
        """Ids of one text or pair; for the arguments see a call."""
        return self(text, text_pair, **kwargs).input_ids

    def encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        """One text or pair, as a call tokenizes it."""
        return self(text, text_pair, **kwargs)

    def batch_encode_plus(self, batch_text_or_text_pairs: Any, **kwargs: Any) -> BatchEncoding:
        """A list of texts or of pairs, as a call tokenizes it."""
        return self(batch_text_or_text_pairs, **kwargs)

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
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
        return_attention_mask: bool | None = None,
        return_token_type_ids: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        split_special_tokens: bool | None = None,
        pad_to_max_length: bool = False,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Tokenize a text, a pair, or a batch of either.

        Args:
            text: a string; a list of them, or of pairs of them, is a batch. With `is_split_into_words` a list of words,
                and a list of such lists, or of pairs of them, is a batch.
            text_pair: second texts, of the same form.
            text_target, text_pair_target: texts whose ids become "labels".
            add_special_tokens: put `[CLS]` and `[SEP]` around.
            padding: True or "longest" pads to the longest row, "max_length" to `max_length`.
            truncation: True or "longest_first", "only_first", "only_second": how texts over `max_length` are cut. False
                leaves them as they are; so does None, with a warning of texts over the model's context.
            max_length: in tokens, special ones included; None is `model_max_length`.
            stride: tokens that an overflowing part shares with the part before it.
            is_split_into_words: texts are lists of words.
            pad_to_multiple_of: round the padded length up to this, of which the length that texts are cut to must be a
                multiple.
            padding_side: "left" or "right" instead of the tokenizer's own.
            return_tensors: "pt" or "np"; rows must then be equally long. None returns lists.
            return_attention_mask, return_token_type_ids: also return these; `model_input_names` decides if not given.
            return_special_tokens_mask, return_offsets_mapping, return_length: also return these.
            return_overflowing_tokens: return what truncation cuts as rows of their own, and
                `overflow_to_sample_mapping`, the number of the text that each row is of.
            split_special_tokens: read special tokens in a text as any other characters; by default the setting of the
                tokenizer, which is False.
            pad_to_max_length: older name of `padding="max_length"`.
            verbose: False leaves out the warning of long texts.

        Raises:
            InputError: texts of the wrong form, contradictory options, or rows that make no tensor.
        """
        if text_target is not None or text_pair_target is not None:
            given = {name: value for name, value in locals().items() if name not in _TARGETS}
            labels = self(text_target, text_pair_target, **given)
            if text is None:
                return labels
            encoded = self(text, text_pair, **given)
            encoded["labels"] = labels.input_ids
            return encoded
        batched, inputs = rows_of(text, text_pair, is_split_into_words)
        padding = "max_length" if pad_to_max_length and not padding else padding
        if stride != 0:
            check_value("stride", stride, int, {"limits": Limits(0)})
        pair = any(isinstance(row, tuple) for row in inputs)
        strategy, limit = truncation_of(padding, truncation, max_length, self.model_max_length, pair)
        if (
            strategy
            and padding not in (False, "do_not_pad")
            and pad_to_multiple_of
            and (limit or 0) % pad_to_multiple_of
        ):
            raise InputError(
                f"texts are cut to {limit} tokens, which is no multiple of pad_to_multiple_of, {pad_to_multiple_of}"
            )
        cut = (strategy, limit or 0, stride) if strategy else None
        split = self.config.get("split_special_tokens") if split_special_tokens is None else split_special_tokens
        rows = self._encode(inputs, add_special_tokens, cut, is_split_into_words, bool(split))
        if return_overflowing_tokens:
            sample = [i for i, encoding in enumerate(rows) for _ in range(1 + len(encoding.overflowing))]
            rows = [row for encoding in rows for row in (encoding, *encoding.overflowing)]
        if return_token_type_ids is None:
            return_token_type_ids = "token_type_ids" in self.model_input_names
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in self.model_input_names
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
        if truncation is None and not strategy and longest > known and verbose:
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
            rows_alone = {name: value if name == "length" else value[0] for name, value in padded.items()}
            padded = BatchEncoding(rows_alone)  # a length stays in its list, as in transformers
        padded.encodings, padded.pad_token = rows, self.pad_token
        padded.pad_id, padded.padding_side = self.pad_token_id, padding_side or self.padding_side
        return to_tensors(padded, return_tensors)

    def encodings(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        truncation: bool | str = False,
        max_length: int | None = None,
    ) -> list[Encoding]:
        """The `tokenizers` encodings of texts or pairs: what a call keeps, without the lists that it makes of them.

        Args:
            texts, pairs: first and second texts.
            add_special_tokens, truncation, max_length: see a call.

        Raises:
            InputError: texts of the wrong form, or contradictory options.
        """
        _, inputs = rows_of(texts, pairs, False)
        strategy, limit = truncation_of(False, truncation, max_length, self.model_max_length, pairs is not None)
        cut = (strategy, limit or 0, 0) if strategy else None
        return self._encode(inputs, add_special_tokens, cut, False, bool(self.config.get("split_special_tokens")))

    def _encode(
        self,
        inputs: list[Any],
        add_special_tokens: bool,
        truncation: tuple[str, int, int] | None,
        words: bool = False,
        split_special_tokens: bool = False,
    ) -> list[Encoding]:
        options = "" if truncation is None else f" with truncation, max_length and stride {truncation}"
        with self._lock, _explained(f"a text cannot be tokenized{options}"):
            # Settings of the backend, which is as before at the end: `datasets` takes fingerprints of it.
            try:
                if truncation is None and self.backend.truncation is not None:  # which a caller has set on the backend
                    self.backend.no_truncation()
                if truncation is not None:
                    strategy, limit, stride = truncation
                    side = self.truncation_side
                    self.backend.enable_truncation(limit, stride=stride, strategy=strategy, direction=side)
                if split_special_tokens:
                    self.backend.encode_special_tokens = True
                how = {"is_pretokenized": words, "add_special_tokens": add_special_tokens}
                if len(inputs) == 1:  # which needs no threads
                    first, second = inputs[0] if isinstance(inputs[0], tuple) else (inputs[0], None)
                    return [self.backend.encode(first, second, **how)]
                return self.backend.encode_batch(inputs, **how)
            finally:
                if truncation is not None:
                    self.backend.no_truncation()
                if split_special_tokens:
                    self.backend.encode_special_tokens = False

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pad rows to one length.

        Args:
            encoded_inputs: a dict of a row or of lists of rows, or a list of dicts with a row each; "input_ids" is
                needed, and "labels" are padded with -100. Rows that are tensors or arrays give such.
            padding, max_length, pad_to_multiple_of, padding_side, return_tensors, return_attention_mask, verbose: see a
                call.

        Raises:
            InputError: an option is impossible, or there is no padding token.
        """
        if not isinstance(encoded_inputs, Mapping):
            rows = encoded_inputs if isinstance(encoded_inputs, list | tuple) else ()
            if not rows or not all(isinstance(row, Mapping) and rows[0].keys() <= row.keys() for row in rows):
                raise InputError("encoded_inputs must be a dict of rows, or a list of dicts that have the same keys")
            encoded_inputs = {name: [row[name] for row in encoded_inputs] for name in encoded_inputs[0]}
        if "input_ids" not in encoded_inputs:
            given = ", ".join(map(str, encoded_inputs)) or "no keys"
            raise InputError(f"there is nothing to pad by: input_ids is missing among {given}")
        ids = encoded_inputs["input_ids"]
        first = ids[0] if len(ids) else None
        alone = isinstance(to_list(first), int)
        if return_tensors is None and not isinstance(first, list | int):
            return_tensors = next(
                (k for k, cls in _TENSORS.items() if isinstance(ids, cls) or isinstance(first, cls)), None
            )
        data: dict[str, Any] = {
            name: [to_list(values)] if alone else _rows(values) for name, values in encoded_inputs.items()
        }
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
            if "attention_mask" in self.model_input_names if return_attention_mask is None else return_attention_mask:
                data.setdefault("attention_mask", [[1] * n for n in lengths])
            pad_rows(data, target, self.pad_token_id, side)
        return BatchEncoding({name: rows[0] for name, rows in data.items()} if alone else data, None, return_tensors)

    # Ids with special tokens around

    def _laid_out(self, first: Sequence[int], second: Sequence[int] | None = None) -> list[tuple[int, int, int]]:
        """Ids, types and whether they are special ones, of a text or pair with special tokens around, as the template
        of tokenizer.json puts them."""
        probe = next(iter(self.all_special_tokens), "a")
        (encoding,) = self._encode([probe if second is None else (probe, probe)], True, None)
        out: list[tuple[int, int, int]] = []
        parts, given = zip(encoding.sequence_ids, encoding.ids, encoding.type_ids, strict=True), (first, second or ())
        for (sequence, kind), group in itertools.groupby(parts, lambda part: (part[0], part[2])):
            ids = [i for _, i, _ in group] if sequence is None else given[sequence]
            out += [(i, kind, int(sequence is None)) for i in ids]
        return out

    def build_inputs_with_special_tokens(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """Ids of a text or pair with special tokens around."""
        return [i for i, _, _ in self._laid_out(token_ids_0, token_ids_1)]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """For each of the ids with special tokens around its type, by the template of tokenizer.json."""
        return [kind for _, kind, _ in self._laid_out(token_ids_0, token_ids_1)]

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for each special token and 0 for others.

        Args:
            token_ids_0, token_ids_1: ids of a text or pair.
            already_has_special_tokens: whether `token_ids_0` are all ids, special ones included; else the mask is of
                what `build_inputs_with_special_tokens` gives.
        """
        if not already_has_special_tokens:
            return [special for _, _, special in self._laid_out(token_ids_0, token_ids_1)]
        if token_ids_1 is not None:
            raise InputError("token_ids_1 is given with already_has_special_tokens; give all ids as token_ids_0")
        special_ids = set(self.all_special_ids)
        return [int(i in special_ids) for i in to_list(token_ids_0)]

    def prepare_for_model(
        self,
        ids: Sequence[int],
        pair_ids: Sequence[int] | None = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_token_type_ids: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_length: bool = False,
        **padded: Any,
    ) -> BatchEncoding:
        """A text or pair whose ids are known already, as a call makes it of text; options are those of a call."""
        strategy, limit = truncation_of(padding, truncation, max_length, self.model_max_length, pair_ids is not None)
        first, second = list(to_list(ids)), None if pair_ids is None else list(to_list(pair_ids))
        if strategy is not None and limit is not None:
            room = limit - self.num_special_tokens_to_add(second is not None) * add_special_tokens
            if room < 0:
                raise InputError(f"max_length is {limit}, which leaves no room beside the special tokens")
            first, second = _cut(first, second, room, strategy, self.truncation_side)
        if add_special_tokens:
            parts = self._laid_out(first, second)
        else:
            parts = [(i, n, 0) for n, some in enumerate((first, second or ())) for i in some]
        if return_token_type_ids is None:
            return_token_type_ids = "token_type_ids" in self.model_input_names
        names = ("input_ids", True), ("token_type_ids", return_token_type_ids)
        wanted = (*names, ("special_tokens_mask", return_special_tokens_mask))
        data: dict[str, Any] = {name: [part[n] for part in parts] for n, (name, want) in enumerate(wanted) if want}
        data["attention_mask"] = [1] * len(parts)
        data |= {"length": len(parts)} if return_length else {}
        if not data["input_ids"]:
            return BatchEncoding(data)
        return self.pad(data, padding=padding, max_length=limit if limit is not None else max_length, **padded)

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """Make a text of a conversation by the chat template, and tokenize it; needs jinja2.

        Args:
            conversation: a list of messages, such as {"role": "user", "content": "Hello"}, or a list of such lists.
            tools: schemas of functions that the template may describe.
            documents: texts that the template may show.
            chat_template: a Jinja template, or the name of one of the tokenizer's; by default the tokenizer's own.
            add_generation_prompt: end with what begins an answer.
            continue_final_message: end with the content of the last message, which is to be continued; or with another
                of its fields, by its name.
            tokenize: False gives the text.
            padding, truncation, max_length, return_tensors, tokenizer_kwargs: as in a call.
            return_dict: False gives the ids alone.
            return_assistant_tokens_mask: also give "assistant_masks", 1 for tokens that the template has between
                `{% generation %}` and `{% endgeneration %}`.
            variables: more for the template.

        Raises:
            InputError: there is no template, or it fails; or jinja2 is not installed.
        """
        if add_generation_prompt and continue_final_message:
            raise InputError("add_generation_prompt and continue_final_message are given; give one of them")
        if wrong := [tool for tool in tools or () if not isinstance(tool, Mapping)]:
            raise InputError(f"tools holds {shown(wrong[0])}; give the JSON schema of each function")
        template = chosen(self.chat_template, chat_template, tools is not None)
        batched = isinstance(conversation, list | tuple) and isinstance(next(iter(conversation), None), list | tuple)
        given = {**self.special_tokens_map, "add_generation_prompt": add_generation_prompt}
        given |= {"tools": tools, "documents": documents, **variables}
        texts, spans = [], []
        for messages in conversation if batched else [conversation]:
            field = continue_final_message if isinstance(continue_final_message, str) else "content"
            text, inside = rendered(template, messages, given, None if field == "content" else field)
            if continue_final_message and field == "content":
                text = before_end_of(messages[-1], text)
            texts.append(text)
            spans.append(inside)
        if not tokenize:
            return texts if batched else texts[0]
        one = not batched and return_tensors is None
        encoded = self(
            texts[0] if one else texts,
            **{"padding": padding, "truncation": truncation, "max_length": max_length, "add_special_tokens": False}
            | dict(tokenizer_kwargs or {}),
        )
        if return_assistant_tokens_mask:
            masks = [
                [int(any(a <= start < end <= b for a, b in inside)) for start, end in encoded[row].offsets]
                for row, inside in enumerate(spans)
            ]
            encoded["assistant_masks"] = masks[0] if one else masks
        encoded.convert_to_tensors(return_tensors)
        return encoded if return_dict else encoded.input_ids

    def train_new_from_iterator(
        self,
        text_iterator: Iterable[str] | Iterable[list[str]],
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: Sequence[str | AddedToken] | None = None,
        special_tokens_map: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """A tokenizer of the same kind whose vocabulary is learned from texts.

        Args:
            text_iterator: texts, or batches of them.
            vocab_size: tokens at most, special ones included; other added tokens come on top.
            length: how many there are, for the progress bar.
            new_special_tokens: special tokens to add.
            special_tokens_map: new contents of special tokens, by the old ones.
            kwargs: for the trainer of the `tokenizers` library, such as `show_progress` and `min_frequency`.

        Raises:
            InputError: the texts or an option cannot be used.
        """
        names = dict(special_tokens_map or {})
        added = list(self.added_tokens_decoder.values())
        special = [_token("a special token", names.get(t.content, t.content), True) for t in added if t.special]
        special += [_token("new_special_tokens", token, True) for token in new_special_tokens or ()]
        with _explained("the tokenizer cannot be trained"):
            backend = trained(self.backend, names, text_iterator, vocab_size, length, special, kwargs)
        backend.add_tokens([token for token in added if not token.special])
        config = {name: value for name, value in self.config.items() if name != "added_tokens_decoder"}
        config |= {name: names.get(token, token) for name, token in self.special_tokens_map.items()}
        more = [token.content for token in special[len(special) - len(new_special_tokens or ()) :]]
        config |= {_ADDITIONAL[0]: [names.get(token, token) for token in self._additional] + more}
        for name in ("model_max_length", "padding_side", "truncation_side", "model_input_names"):
            config[name] = getattr(self, name)
        return type(self)(backend, config)

    # Ids to text

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool | None = None,
    ) -> Any:
        """Text of ids: a number, a list or a tensor; rows of ids give a list of texts.

        Args:
            token_ids: the ids.
            skip_special_tokens: leave special tokens out.
            clean_up_tokenization_spaces: take out the space before punctuation; byte-level tokens need none of
                that, so it happens only when asked for.
            spaces_between_special_tokens: has no effect, as in transformers' fast tokenizers.
        """
        values = to_list(token_ids)
        if isinstance(values, int):
            values = [values]
        if values and isinstance(values[0], list):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in values]
        with _ids_checked(values):
            text = self.backend.decode(values, skip_special_tokens=skip_special_tokens)
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    @staticmethod
    def clean_up_tokenization(out_string: str) -> str:
        """A text without the spaces before punctuation and before the ends of English words, such as n't."""
        return _SPACE_BEFORE_MARK.sub(r"\1", out_string)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """Texts of several rows of ids."""
        return [self.decode(row, skip_special_tokens, **kwargs) for row in sequences]


def _rows(values: Any) -> list[Any]:
    """Rows of a batch as lists."""
    rows = to_list(values)
    return list(rows) if not rows or isinstance(rows[0], list | int) else [to_list(row) for row in rows]


def _cut(
    first: list[int], second: list[int] | None, room: int, strategy: str, side: str
) -> tuple[list[int], list[int] | None]:
    """The ids of a text or pair that have room; of the longer one first where the strategy is "longest_first"."""
    sizes = [len(first), len(second or ())]
    if strategy != "longest_first":
        sizes[strategy == "only_second"] -= max(sum(sizes) - room, 0)
    elif sum(sizes) > room:  # as the `tokenizers` library shares out the room
        is_swapped = sizes[0] > sizes[1]
        small = min(sizes)
        large = small if small > room else max(small, room - small)
        small, large = (room // 2, room - room // 2) if small + large > room else (small, large)
        sizes = [large, small] if is_swapped else [small, large]
    if min(sizes) < 0:
        raise InputError(f"truncation is {strategy!r}, and that text is too short to be cut to max_length")
    pairs = zip((first, second or []), sizes, strict=True)
    kept = [ids[:n] if side == "right" else ids[len(ids) - n :] for ids, n in pairs]
    return kept[0], None if second is None else kept[1]


# The names that code written for transformers imports.
PreTrainedTokenizer = PreTrainedTokenizerBase = PreTrainedTokenizerFast = Tokenizer


def _refuse_fixed(name: str, value: Any) -> None:
    """Refuse to change what stands in `tokenizer.json`."""
    if name == "add_prefix_space":
        raise InputError(f"add_prefix_space is {shown(value)}; from_pretrained(add_prefix_space=...) changes it")
    if value not in (None, False):
        raise InputError(
            f"{name} is {shown(value)}; tokenizer.json has the template of special tokens, and tokenizer."
            "backend.post_processor sets another"
        )


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
