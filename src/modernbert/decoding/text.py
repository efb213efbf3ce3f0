"""Tokens to text as they come: pieces that never cut a character, and strings that end a text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet


class Tokenizer(Protocol):
    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """Text of ids."""


class TextPieces:
    """The text of tokens that come one by one, in pieces of whole characters.

    Args:
        tokenizer: decodes ids.
        skip_special_tokens: leave special tokens out.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self.tokenizer = tokenizer
        self.skip = skip_special_tokens
        self.ids: list[int] = []
        self.context = 0  # where decoding begins: some tokens read differently at the beginning of a text
        self.given = 0  # tokens whose text was given

    def push(self, ids: Sequence[int]) -> str:
        """Take tokens; the text that they complete, which may be none."""
        self.ids += ids
        before, text = self._decode(self.given), self._decode(len(self.ids))
        if text == before:  # special tokens alone
            del self.ids[self.given :]
        if len(text) <= len(before) or text.endswith(_REPLACEMENT):
            return ""
        self.context, self.given = self.given, len(self.ids)
        return text[len(before) :]

    def finish(self) -> str:
        """What is left at the end, unfinished characters as U+FFFD."""
        rest = self._decode(len(self.ids))[len(self._decode(self.given)) :]
        self.context = self.given = len(self.ids)
        return rest

    def of(self, tokens: Iterable[int]) -> Iterator[str]:
        for token in tokens:
            if piece := self.push([token]):
                yield piece
        if rest := self.finish():
            yield rest

    def _decode(self, end: int) -> str:
        return self.tokenizer.decode(self.ids[self.context : end], skip_special_tokens=self.skip)


class TextStreamer:
    """Gives text on as it is generated, for `generate(streamer=...)`; by default prints it.

    Args:
        tokenizer: decodes ids.
        skip_prompt: give the continuation alone.
        on_text: gets each piece and whether it is the last; None prints.
        skip_special_tokens: leave special tokens out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_prompt: bool = False,
        on_text: Callable[[str, bool], None] | None = None,
        skip_special_tokens: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt, self.skip_special_tokens = skip_prompt, skip_special_tokens
        self.on_text = on_text or _print
        self._begin()

    def _begin(self) -> None:
        self.pieces = TextPieces(self.tokenizer, self.skip_special_tokens)
        self.prompt_comes = True

    def put(self, value: Any) -> None:
        """Take the prompt's ids first, then the others as they come."""
        ids = [int(i) for i in value.flatten().tolist()] if hasattr(value, "flatten") else [int(i) for i in value]
        is_prompt, self.prompt_comes = self.prompt_comes, False
        if is_prompt and self.skip_prompt:
            return
        piece = self.pieces.push(ids)
        if piece:
            self.on_text(piece, False)

    def end(self) -> None:
        """Give what is left; ready for another text."""
        self.on_text(self.pieces.finish(), True)
        self._begin()


def _print(piece: str, last: bool) -> None:
    sys.stdout.write(piece + ("\n" if last else ""))
    sys.stdout.flush()


def holds_stop(tokenizer: Tokenizer, stops: Sequence[str], new_ids: Sequence[int]) -> bool:
    """Whether the last of these tokens completes one of the strings."""
    if not stops or not new_ids:
        return False
    longest = max(len(stop.encode()) for stop in stops)
    # A token is at least one byte; some at the front may be halves of characters.
    tail = tokenizer.decode(list(new_ids[-longest - 4 :]))
    return any(stop in tail for stop in stops)
