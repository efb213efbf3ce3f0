"""Stand-alone HTML pages of texts: a template of this folder with its data written into it; nothing is fetched."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from typing import Any

from tokenizers import Encoding

from modernbert.checks import check_text
from modernbert.errors import InputError
from modernbert.text.tokenizer import Tokenizer


def page(title: str, content: str) -> str:
    """A page with this title; `content` goes on from the style sheet in the head to the end."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n{content}"
    )


def filled(template: str, title: str, data: dict[str, Any]) -> str:
    """The template of this name with a title, and with plain values that its script reads."""
    text = (files("modernbert.tools") / template).read_text(encoding="utf-8")
    # "<" could end the script that the data stands in.
    literal = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    return page(title, text.replace("{{title}}", html.escape(title)).replace("{{data}}", literal))


def encoded(tokenizer: Tokenizer, text: Any, longest: int) -> tuple[Encoding, list[str]]:
    """A text's encoding, and what a page shows of each token.

    Raises:
        InputError: the text is empty, no string, or longer than `longest` tokens.
    """
    (encoding,) = tokenizer([check_text(text, "text")]).encodings or ()
    if not encoding.ids:
        raise InputError(f"the text makes no token with this tokenizer: {text!r}")
    if len(encoding.ids) > longest:
        raise InputError(f"the text has {len(encoding.ids)} tokens; a page holds at most {longest}")
    tokens = zip(encoding.tokens, encoding.offsets, encoding.special_tokens_mask, strict=True)
    return encoding, [name if special or start == end else text[start:end] for name, (start, end), special in tokens]
