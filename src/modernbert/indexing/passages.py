"""Documents cut into passages, and into the windows in which a model reads these."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from modernbert.io.tables.reading import library

Span = tuple[int, int]  # characters [start, end)


class Window(NamedTuple):
    """Characters [start, end) that are read in one pass, and the numbers [new, last) of the passages read there."""

    start: int
    end: int
    new: int
    last: int


class Tokens:
    """Counts the tokens of parts of a text.

    Args:
        offsets: characters [start, end) of each token.
    """

    def __init__(self, offsets: Sequence[Span]) -> None:
        self.starts = [start for start, end in offsets if end > start]

    def count(self, start: int, end: int) -> int:
        """Tokens that begin in the characters [start, end)."""
        return bisect.bisect_left(self.starts, end) - bisect.bisect_left(self.starts, start)

    def after(self, start: int, number: int) -> int | None:
        """The character at which the token begins that comes so many tokens after `start`; None past the end."""
        i = bisect.bisect_left(self.starts, start) + number
        return self.starts[i] if i < len(self.starts) else None

    def before(self, start: int, number: int) -> int:
        """The character at which the token begins that comes so many tokens before `start`, or the first one."""
        return min(start, self.starts[max(0, bisect.bisect_left(self.starts, start) - number)]) if number else start


def sentences_of(text: str, language: str) -> list[Span]:
    """Sentences of a text, end to end, each with the white space that follows it."""
    segment = library("sentencex", Path("an index"), "search").get_sentence_boundaries
    starts = [0, *(found["start_index"] for found in segment(language, text)), len(text)]
    return [(start, end) for start, end in itertools.pairwise(starts) if end > start]


def passages_of(text: str, tokens: Tokens, most: int, language: str) -> list[Span]:
    """Passages of at most so many tokens, each as many sentences as fit; a longer sentence is cut between words.

    A passage that is at least half full ends at the end of a paragraph. White space around passages is left out.
    """
    found: list[Span] = []
    start = end = 0  # of the passage that is being filled
    for first, last in sentences_of(text, language):
        ends_paragraph = "\n\n" in text[first:last] and tokens.count(start, first) * 2 >= most
        if end > start and tokens.count(start, last) > most:
            found.append((start, end))
            start = first
        while tokens.count(start, last) > most and (limit := tokens.after(start, most)) is not None:
            space = max(text.rfind(" ", start, limit), text.rfind("\n", start, limit)) + 1
            cut = space if tokens.count(start, space) * 2 > most else limit
            if cut <= start:  # one character of very many tokens
                break
            found.append((start, cut))
            start = cut
        end = last
        if ends_paragraph:
            found.append((start, end))
            start = end
    if end > start:
        found.append((start, end))
    trimmed = ((a + len(text[a:b]) - len(text[a:b].lstrip()), a + len(text[a:b].rstrip())) for a, b in found)
    return [(a, b) for a, b in trimmed if b > a and tokens.count(a, b)]


def windows_of(passages: Sequence[Span], tokens: Tokens, room: int, overlap: int) -> list[Window]:
    """Windows of at most so many tokens that cover all passages.

    Each begins with the last `overlap` tokens of the one before, in whose context its first passages are read.
    """
    found: list[Window] = []
    new = 0
    while new < len(passages):
        first, last = passages[new]
        more = min(overlap, room - tokens.count(first, last)) if new else 0
        start, end = tokens.before(first, max(0, more)), new + 1
        while end < len(passages) and tokens.count(start, passages[end][1]) <= room:
            end += 1
        found.append(Window(start, passages[end - 1][1], new, end))
        new = end
    return found
