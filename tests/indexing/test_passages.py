"""Passages end where sentences do, hold as many tokens as they may, and windows cover them all."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert.indexing.passages import Tokens, passages_of, sentences_of, windows_of

pytest.importorskip("sentencex", reason="the extra `search` is not installed")
PIECES = [
    "Dr. Smith left. ",
    "It is 3.5 m. ",
    "中文句子。",
    "第二句！",
    "word ",
    "\n\n",
    "\n",
    "# Heading\n\n",
    "x" * 30,
    "😀",
    " ",
]


def tokens_of(text):
    """A token a word or sign, as an encoder's tokenizer has about as many."""
    return Tokens([found.span() for found in re.finditer(r"[a-zA-Z0-9]{1,4}|\S", text)])


@pytest.mark.parametrize(
    ("language", "sentences"),
    [
        ("en", ["Dr. Smith paid 3.5 million to J. R. Tolkien, e.g. for tea. ", "Mr. Brown left the U.S. Army. "]),
        ("en", ["It costs 5.00! ", '"Is it?" ', "See fig. 3 in the text. ", "Visit example.com now."]),
        ("de", ["Das ist z. B. der Oktober, d. h. ein Feiertag. ", "Ja."]),
        ("zh", ["中文句子。", "第二句！", "第三句？"]),
        ("ja", ["これは文です。", "次の文です。"]),
    ],
)
def test_sentences_end_where_a_reader_would_end_them(language, sentences):
    text = "".join(sentences)
    assert [text[a:b] for a, b in sentences_of(text, language)] == sentences


@given(st.lists(st.sampled_from(PIECES), max_size=60), st.integers(8, 40))
def test_passages_hold_all_words_in_order_and_no_more_tokens_than_they_may(pieces, most):
    text = "".join(pieces)
    tokens = tokens_of(text)
    passages = passages_of(text, tokens, most, "en")
    assert "".join("".join(text[a:b].split()) for a, b in passages) == "".join(text.split())
    assert all(0 < tokens.count(a, b) <= most for a, b in passages)
    assert all(text[a:b] == text[a:b].strip() for a, b in passages)
    windows = windows_of(passages, tokens, 2 * most, most // 2)
    assert [i for w in windows for i in range(w.new, w.last)] == list(range(len(passages)))
    for window in windows:
        assert tokens.count(window.start, window.end) <= 2 * most
        assert window.start <= passages[window.new][0]
        assert window.end == passages[window.last - 1][1]


def test_a_passage_ends_with_a_paragraph_once_it_is_half_full():
    first, second = "One two three four five. Six seven.\n\n", "Eight nine. Ten."
    passages = passages_of(first + second, tokens_of(first + second), 16, "en")
    assert [(first + second)[a:b] for a, b in passages] == [first.strip(), second]


def test_later_windows_begin_with_tokens_of_the_one_before():
    text = "This is a sentence of words. " * 20
    tokens = tokens_of(text)
    passages = passages_of(text, tokens, 12, "en")
    first, *others = windows_of(passages, tokens, 40, 5)
    assert first.start == 0
    assert [tokens.count(window.start, passages[window.new][0]) for window in others] == [5] * len(others)
