"""The loops against a table of scores in the place of a model."""

import itertools
import math

import pytest
import torch

from modernbert.decoding.loops import Generation
from modernbert.decoding.options import GenerationOptions
from modernbert.errors import InputError

SIZE, END = 6, 5


class Table:
    """A decoder whose next token hangs on the last one alone, and which counts the texts it goes on with."""

    def __init__(self, prompts, seed=0):
        self.prompts = prompts
        self.scores = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2
        self.last, self.texts = [], []

    def start(self, most):
        self.most = most
        self.last = [prompt[-1] for prompt in self.prompts]
        return self.scores[self.last]

    def step(self, tokens):
        self.last = list(tokens)
        self.texts.append(len(tokens))
        return self.scores[self.last]

    def select(self, texts):
        self.last = [self.last[t] for t in texts]


def generation(prompts, limits, seed=0, **options):
    return Generation(Table(prompts, seed), limits, GenerationOptions.make({"eos_token_id": END, **options}, {}))


@pytest.mark.parametrize("seed", range(5))
def test_greedy_decoding_follows_the_best_token_and_finished_texts_leave(seed):
    prompts, limits = [[0], [1, 2], [3], [4]], [7, 3, 1, 5]
    made = generation(prompts, limits, seed)
    expected = []
    for prompt, limit in zip(prompts, limits, strict=True):
        ids = [prompt[-1]]
        while len(ids) <= limit and ids[-1] != END:
            ids.append(int(made.decoder.scores[ids[-1]].argmax()))
        expected.append(ids[1:])
    assert made.new_ids() == expected
    longest = max(map(len, expected))
    assert made.decoder.texts == [sum(len(ids) > n for ids in expected) for n in range(1, longest)]
    assert made.decoder.most == max(limits)


def test_steps_are_the_texts_as_they_come():
    made = generation([[0], [1]], [6, 2], eos_token_id=[])
    new = [[], []]
    for step in made.steps():
        assert torch.equal(step.scores_BV.argmax(-1), torch.tensor(step.tokens))
        for text, token in zip(step.texts, step.tokens, strict=True):
            new[text].append(token)
        assert [history.new for history in made.texts] == new
    assert list(map(len, new)) == [6, 2]
    assert list(generation([[0]], [6], eos_token_id=[]).tokens()) == new[0]


@pytest.mark.parametrize("seed", range(5))
def test_a_beam_search_as_wide_as_the_tree_finds_the_best_text(seed):
    limit, start = 3, 2
    made = generation([[start]], [limit], seed, num_beams=SIZE**limit, early_stopping="never", length_penalty=0.0)
    likely = made.decoder.scores.log_softmax(-1)
    found = {}
    for ids in itertools.product(range(SIZE), repeat=limit):
        cut = ids[: ids.index(END) + 1] if END in ids else ids
        found[cut] = sum(float(likely[a, b]) for a, b in itertools.pairwise((start, *cut)))
    best = max(found, key=found.get)
    (score,) = made.beams()
    assert made.new_ids() == [list(best)]
    assert math.isclose(score, found[best], abs_tol=1e-4)


def test_mistakes_are_told_before_anything_is_read():
    table, options = Table([[0]]), GenerationOptions.make({"stop_strings": "a"}, {})
    with pytest.raises(InputError, match="stop_strings need tokenizer="):
        Generation(table, [3], options)
    with pytest.raises(InputError, match="generator is a int"):
        Generation(table, [3], GenerationOptions.make({}, {}), 5)
    with pytest.raises(InputError, match="a beam search draws from one generator"):
        Generation(table, [3], GenerationOptions.make({"num_beams": 2}, {}), [torch.Generator()])
    assert not table.last
