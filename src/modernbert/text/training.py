"""A new vocabulary for a tokenizer of the same kind."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as Backend

from modernbert.errors import InputError, shown

_EMPTY: dict[str, dict[str, Any]] = {  # models as `tokenizer.json` has them, before they are trained
    "BPE": {"vocab": {}, "merges": []},
    "Unigram": {"vocab": [], "unk_id": None},
    "WordLevel": {"vocab": {}},
    "WordPiece": {"vocab": {}},
}


def trained(
    old: Backend,
    names: Mapping[str, str],
    texts: Iterable[Any],
    vocab_size: int,
    length: int | None,
    special: Sequence[AddedToken],
    options: Mapping[str, Any],
) -> Backend:
    """A backend with the parts of an old one and a vocabulary that is learned from texts.

    Args:
        old: where all but the vocabulary is from.
        names: new contents of special tokens, by the old ones.
        texts: texts, or batches of them.
        vocab_size: tokens at most, special ones included.
        length: how many texts or batches there are, for the progress bar.
        special: all special tokens, which come first.
        options: attributes of the trainer.
    """
    state = json.loads(old.to_str())
    template, model = state["post_processor"], state["model"]
    state.update(added_tokens=[], post_processor=None, model=model | _EMPTY[model["type"]])
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        state["model"]["unk_token"] = model["unk_token"]
    fresh = Backend.from_str(json.dumps(state))
    trainer = fresh.model.get_trainer()
    settings = {"vocab_size": vocab_size, "special_tokens": list(special)}
    if "ByteLevel" in json.dumps(state["pre_tokenizer"]):
        settings["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if model.get(name) and hasattr(trainer, name):
            settings[name] = model[name]
    for name, value in {**settings, **options}.items():
        if not hasattr(trainer, name):
            raise InputError(f"{name} is {shown(value)}; {type(trainer).__name__} has no option of that name")
        setattr(trainer, name, value)
    fresh.train_from_iterator(texts, trainer, length)
    if template is None:
        return fresh
    return Backend.from_str(
        json.dumps({**json.loads(fresh.to_str()), "post_processor": _renamed(template, names, fresh)})
    )


def _renamed(part: Any, names: Mapping[str, str], vocabulary: Backend) -> Any:
    """A post-processor, or a part of it, with the new contents and ids of special tokens."""
    if isinstance(part, list) and len(part) == 2 and isinstance(part[0], str) and isinstance(part[1], int):
        new = names.get(part[0], part[0])  # ["[CLS]", 0] of Bert's and Roberta's
        return [new, vocabulary.token_to_id(new)]
    if isinstance(part, list):
        return [_renamed(one, names, vocabulary) for one in part]
    if not isinstance(part, dict):
        return part
    if "ids" in part and "tokens" in part:  # of a template's special token
        tokens = [names.get(token, token) for token in part["tokens"]]
        return {
            "id": names.get(part["id"], part["id"]),
            "ids": [vocabulary.token_to_id(t) for t in tokens],
            "tokens": tokens,
        }
    if "SpecialToken" in part:
        inner = part["SpecialToken"]
        return {"SpecialToken": {**inner, "id": names.get(inner["id"], inner["id"])}}
    return {names.get(name, name): _renamed(value, names, vocabulary) for name, value in part.items()}
