"""Streams of text: whole characters, the same text in the end, and strings that end it."""

import queue
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from modernbert.decoding.text import TextIteratorStreamer, TextPieces, holds_stop
from modernbert.pipelines import small_model


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(small_model())


@given(st.text(alphabet="ab \n\u00e9\u4f60\u597d\U0001f600\U0001f1e9\U0001f1ea.", min_size=1, max_size=40))
def test_pieces_are_the_text_and_never_cut_a_character(text):
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = TextPieces(tokenizer)
    parts = [pieces.push([i]) for i in ids]
    assert not any("\ufffd" in part for part in parts)
    assert "".join([*parts, pieces.finish()]) == tokenizer.decode(ids)
    assert pieces.finish() == ""


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer):
    ids = tokenizer("\U0001f600", add_special_tokens=False).input_ids
    assert len(ids) > 1
    pieces = TextPieces(tokenizer)
    assert pieces.push(ids[:-1]) == ""
    assert "\ufffd" in pieces.finish()


def test_a_streamer(tokenizer, capsys):
    got = []
    for skip in (False, True):
        streamer = TextStreamer(tokenizer, skip_prompt=skip, on_text=lambda piece, last: got.append((piece, last)))
        for _ in range(2):  # a streamer serves one text after another
            got.clear()
            prompt = tokenizer("The dog", return_tensors="pt").input_ids
            streamer.put(prompt)
            streamer.put(tokenizer(" ran", add_special_tokens=False, return_tensors="pt").input_ids)
            streamer.end()
            assert "".join(piece for piece, _ in got) == (" ran" if skip else "The dog ran")
            assert [last for _, last in got][-1] is True
    streamer = TextStreamer(tokenizer)
    streamer.put([tokenizer.cls_token_id, *tokenizer("The dog", add_special_tokens=False).input_ids])
    streamer.end()
    assert capsys.readouterr().out == "The dog\n"


def test_a_streamer_for_another_thread(heads):
    model, tokenizer = (kind.from_pretrained(heads / "CausalLM") for kind in (AutoModelForCausalLM, AutoTokenizer))
    prompt = tokenizer("The dog", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
    thread = threading.Thread(target=model.generate, kwargs={**prompt, "streamer": streamer, "max_new_tokens": 6})
    thread.start()
    text = "".join(streamer)
    thread.join()
    new = model.generate(**prompt, max_new_tokens=6)[0, prompt.input_ids.shape[1] :]
    assert text == tokenizer.decode(new, skip_special_tokens=True)
    with pytest.raises(queue.Empty):
        next(TextIteratorStreamer(tokenizer, timeout=0.01))
    with pytest.raises(TypeError, match="TextIteratorStreamer takes no loud"):
        TextIteratorStreamer(tokenizer, loud=True)

    class Shout(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            got.append(text.upper())

    got = []
    model.generate(**prompt, streamer=Shout(tokenizer, skip_prompt=True), max_new_tokens=6)
    assert "".join(got) == text.upper()


def test_stops_are_found_wherever_tokens_cut_them(tokenizer):
    text = "The dog ran across the road. And then it was gone."
    ids = tokenizer(text, add_special_tokens=False).input_ids
    for stop in ("road.", "ran across", " th", "\u00e9", "And then it was"):
        ends = [i for i in range(1, len(ids) + 1) if holds_stop(tokenizer, [stop, "never here"], ids[:i])]
        first = next((i for i in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:i])), None)
        assert (ends[0] if ends else None) == first
    assert not holds_stop(tokenizer, [], ids)
    assert not holds_stop(tokenizer, ["x"], [])
