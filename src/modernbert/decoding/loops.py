"""The decoding loops: one token after another, and beam search. Finished texts leave the batch.

Shapes: B texts, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from modernbert.decoding.options import GenerationOptions
from modernbert.decoding.samplers import Draw, History, Sampler, place_of
from modernbert.errors import InputError


class Decoder(Protocol):
    """What the loops need of a model. Texts are numbered as they are when a method is called."""

    def reserve(self, tokens: int) -> None:
        """Be ready for so many new tokens of each text."""

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts; scores (B, V), float32, of what follows each."""

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Add one token to each text; scores (B, V), float32, of what follows."""

    def select(self, texts: Sequence[int]) -> None:
        """Go on with these texts, in this order; one may be named several times."""


Stop = Callable[[History], bool]  # whether a text is at its end


@dataclasses.dataclass(frozen=True)
class Step:
    """One token of each text that was not finished before.

    Attributes:
        texts: numbers of the texts.
        tokens: what they got.
        finished: those of the texts that end with it.
        logits_BV: scores as the model gave them.
        scores_BV: scores as the tokens were chosen by.
    """

    texts: list[int]
    tokens: list[int]
    finished: list[int]
    logits_BV: Tensor
    scores_BV: Tensor


def follow(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    options: GenerationOptions,
    sampler: Sampler | None,
    draw: Draw | None,
    stop: Stop,
) -> Iterator[Step]:
    """Greedy decoding, or sampling where `draw` is given, of `num_return_sequences` texts a prompt.

    Args:
        model: reads and scores.
        prompts: ids of each.
        limits: how many new tokens each may get.
        options: how to generate.
        sampler: of `samplers.compose`, or None.
        draw: draws tokens; None takes the best one.
        stop: whether a text is at its end.
    """
    model.reserve(max(limits, default=0))
    logits_BV = model.start(prompts)
    copies = [i for i in range(len(prompts)) for _ in range(options.num_return_sequences)]
    histories = [History(list(prompts[i]), len(prompts[i]), limits[i]) for i in copies]
    if options.num_return_sequences > 1:
        model.select(copies)
        logits_BV = logits_BV[torch.tensor(copies, device=logits_BV.device)]
    texts = list(range(len(copies)))
    while True:
        scores_BV = logits_BV if sampler is None else sampler(logits_BV, histories)
        tokens = (scores_BV.argmax(-1) if draw is None else draw(scores_BV, texts)).tolist()
        going: list[int] = []
        for row, (history, token) in enumerate(zip(histories, tokens, strict=True)):
            history.ids.append(token)
            if not _ends(history, stop):
                going.append(row)
        kept = set(going)
        finished = [texts[row] for row in range(len(texts)) if row not in kept]
        yield Step(texts, tokens, finished, logits_BV, scores_BV)
        if not going:
            return
        if finished:
            model.select(going)
            texts, tokens = [texts[row] for row in going], [tokens[row] for row in going]
            histories = [histories[row] for row in going]
        logits_BV = model.step(tokens)


def _ends(history: History, stop: Stop) -> bool:
    return history.length >= history.limit or stop(history)


@dataclasses.dataclass
class _Search:
    """Beam search on one prompt.

    Attributes:
        running: the beams that go on, with their log-probabilities; best first.
        finished: the best finished beams, with their scores; best first.
    """

    running: list[tuple[History, float]]
    finished: list[tuple[History, float]] = dataclasses.field(default_factory=list)

    def advance(
        self,
        candidates: list[tuple[int, int, float]],
        options: GenerationOptions,
        stop: Stop,
    ) -> list[int] | None:
        """Take the best continuations; the beams that go on, by their present numbers, or None at the end.

        Args:
            candidates: beam, token and log-probability of each, best first; more than `num_beams`, so that enough
                go on when some end.
        """
        beams, penalty = options.num_beams, options.length_penalty
        length = self.running[0][0].length + 1
        going: list[tuple[int, History, float]] = []
        ended: list[tuple[History, float]] = []
        for rank, (beam, token, score) in enumerate(candidates):
            before = self.running[beam][0]
            history = dataclasses.replace(before, ids=[*before.ids, token])
            if not _ends(history, stop):
                going.append((beam, history, score))
            elif rank < beams:
                ended.append((history, score / length**penalty))
        full = len(self.finished) == beams
        if not (full and options.early_stopping is True):
            self.finished = sorted([*self.finished, *ended], key=lambda beam: -beam[1])[:beams]
        going = sorted(going, key=lambda beam: -beam[2])[:beams]
        if not going:
            return None
        self.running = [(history, score) for _, history, score in going]
        if len(self.finished) == beams:
            far = going[0][1].limit if options.early_stopping == "never" and penalty > 0 else length
            if options.early_stopping is True or going[0][2] / far**penalty <= self.finished[-1][1]:
                return None
        return [beam for beam, _, _ in going]


def search(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    options: GenerationOptions,
    sampler: Sampler | None,
    generator: torch.Generator | None,
    stop: Stop,
) -> list[list[tuple[History, float]]]:
    """Beam search: for each prompt its best `num_return_sequences` texts with their scores.

    Arguments as of `follow`; with `do_sample` continuations are drawn instead of the best ones taken.
    """
    beams = options.num_beams
    model.reserve(max(limits, default=0))
    logits_BV = model.start(prompts)
    searches = [
        _Search([(History(list(prompt), len(prompt), limit), 0.0)])
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    active = list(range(len(prompts)))
    # So many that, should each way to end be among the best of each beam, enough others remain.
    number = max(2, 1 + len(options.eos_token_id)) * beams
    rows = [1] * len(prompts)  # beams of each active search
    while active:
        histories = [history for i in active for history, _ in searches[i].running]
        scores_BV = logits_BV.log_softmax(-1)
        if sampler is not None:
            scores_BV = sampler(scores_BV, histories)
        totals_B1 = torch.tensor([[total] for i in active for _, total in searches[i].running])
        scores_BV = scores_BV + totals_B1.to(scores_BV)
        selected: list[int] = []
        still: list[int] = []
        first = 0
        for i, scores_V in zip(active, scores_BV.split(rows), strict=True):
            vocabulary, flat = scores_V.shape[1], scores_V.flatten()
            possible = min(number, int(flat.isfinite().sum()))
            if not possible:
                chosen = torch.empty(0, dtype=torch.int64)
            elif options.do_sample:
                likely = flat.softmax(-1).to(place_of(generator, flat))
                chosen = torch.multinomial(likely, possible, generator=generator).to(flat.device)
            else:
                chosen = flat.topk(possible).indices
            candidates = [
                (index // vocabulary, index % vocabulary, score)
                for index, score in zip(chosen.tolist(), flat[chosen].tolist(), strict=True)
            ]
            going = searches[i].advance(candidates, options, stop)
            if going is not None:
                still.append(i)
                selected += [first + beam for beam in going]
            first += len(scores_V)
        active, rows = still, [len(searches[i].running) for i in still]
        if active:
            model.select(selected)
            logits_BV = model.step([history.ids[-1] for i in active for history, _ in searches[i].running])
    for found in searches:
        if len(found.finished) < options.num_return_sequences:
            raise InputError(
                f"num_return_sequences is {options.num_return_sequences} and beam search found {len(found.finished)} "
                "continuations of a prompt; the options leave no more"
            )
    return [found.finished[: options.num_return_sequences] for found in searches]
