"""Stand-alone HTML pages: a template of this folder with its data written into it; nothing is fetched."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from typing import Any

from tokenizers import Encoding

from modernbert.errors import InputError
from modernbert.text.tokenizer import Tokenizer


def filled(template: str, title: str, data: dict[str, Any]) -> str:
    """A template with a title and data.

    Args:
        template: name of a file of this folder.
        title: of the page.
        data: what its script reads; plain values.
    """
    text = (files("modernbert.tools.explain") / template).read_text(encoding="utf-8")
    # "<" could end the script that the data stands in.
    literal = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    return text.replace("{{title}}", html.escape(title)).replace("{{data}}", literal)


def encoded(tokenizer: Tokenizer, text: Any, longest: int) -> tuple[Encoding, list[str]]:
    """A text's encoding, and what to write for each token.

    Raises:
        InputError: the text is empty, no string, or longer than `longest` tokens.
    """
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"text is {text!r}; give a string that is not empty")
    encodings = tokenizer([text]).encodings
    assert encodings is not None
    encoding = encodings[0]
    if not encoding.ids:
        raise InputError(f"the text makes no token with this tokenizer: {text!r}")
    if len(encoding.ids) > longest:
        raise InputError(f"the text has {len(encoding.ids)} tokens; a page holds {longest} at the most")
    shown = []
    for (start, end), piece, special in zip(
        encoding.offsets, encoding.tokens, encoding.special_tokens_mask, strict=True
    ):
        shown.append(piece if special or start == end else text[start:end])
    return encoding, shown
