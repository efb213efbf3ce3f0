"""The decoding loops: one token after another, and beam search. Finished texts leave the batch.

Shapes: B texts, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from modernbert.decoding.decoders import CachedDecoder, UncachedDecoder
from modernbert.decoding.options import GenerationOptions
from modernbert.decoding.processors import Handed, Rules
from modernbert.decoding.samplers import Draw, Generators, History, place_of
from modernbert.decoding.text import Tokenizer, holds_stop
from modernbert.errors import InputError


@dataclasses.dataclass(frozen=True)
class Step:
    """One token of each text that was not finished before; in a beam search, all beams that go on."""

    texts: list[int]  # their numbers, or the rows of the beams
    tokens: list[int]
    histories: list[History]
    logits_BV: Tensor  # as the model gave them
    scores_BV: Tensor  # as the tokens were chosen by

    def of_all(self, scores_BV: Tensor, texts: int) -> Tensor:
        """These scores (B, ...) among those of all texts, zeros for the finished ones."""
        whole = torch.zeros((texts, *scores_BV.shape[1:]), device=scores_BV.device)
        return whole.index_copy_(0, torch.tensor(self.texts, device=whole.device), scores_BV)


class Generation:
    """Goes on with prompts: what `generate` does once its arguments are checked.

    Args:
        decoder: reads the prompts, which are ids of the vocabulary, at least one each; scores what follows.
        limits: how many new tokens each may get.
        options: how to generate.
        generator: draws, for the whole batch or one for each text; None takes PyTorch's global one.
        tokenizer: decodes for `stop_strings`, which need it.
        handed: what the caller handed over.
        keep_scores: collect the scores of every step in `scores`.

    Raises:
        InputError: the arguments do not fit each other.
    """

    def __init__(
        self,
        decoder: CachedDecoder | UncachedDecoder,
        limits: Sequence[int],
        options: GenerationOptions,
        generator: Generators = None,
        tokenizer: Tokenizer | None = None,
        handed: Handed | None = None,
        keep_scores: bool = False,
    ) -> None:
        several = generator if isinstance(generator, Sequence) else [generator or torch.default_generator]
        if not all(isinstance(g, torch.Generator) for g in several):
            raise InputError(f"generator is a {type(generator).__name__}; give a torch.Generator or a list of them")
        if options.num_beams > 1 and isinstance(generator, Sequence):
            raise InputError("generator is a list; a beam search draws from one generator")
        if options.stop_strings and tokenizer is None:
            raise InputError("stop_strings need tokenizer=, which decodes what they are looked for in")
        self.decoder, self.limits, self.options = decoder, limits, options
        self.generator, self.tokenizer = generator, tokenizer
        self.scores: list[Tensor] | None = [] if keep_scores else None
        self.rules = Rules(options, handed or Handed(), getattr(decoder, "model", None))
        self.totals: list[float] = []  # scores of the texts that a beam search found
        self.texts: list[History] = []  # as far as they are, `num_return_sequences` a prompt, one after another

    def new_ids(self) -> list[list[int]]:
        """New ids of all texts, at the end."""
        if self.options.num_beams > 1:
            self.beams()
        else:
            for _ in self.steps():
                pass
        return [history.new for history in self.texts]

    def tokens(self) -> Iterator[int]:
        """New ids of the only text, as they come."""
        return (step.tokens[0] for step in self.steps())

    def steps(self) -> Iterator[Step]:
        """Greedy decoding, or sampling with `do_sample`."""
        steps = self._follow()
        while True:
            with torch.inference_mode():  # not across a yield, where it would be the caller's too
                step = next(steps, None)
            if step is None:
                return
            yield step

    @torch.inference_mode()
    def beams(self, watch: Callable[[Step], None] | None = None) -> list[float]:
        """Beam search, which draws continuations with `do_sample` instead of taking the best; scores of the texts.

        Beam b of prompt p is row p * `num_beams` + b; `watch` gets every step with the beams before it.
        """
        for _ in self.search(watch):
            pass
        return self.totals

    def search(self, watch: Callable[[Step], None] | None = None) -> Iterator[None]:
        """`beams` by single steps, in the caller's inference mode; `texts` and `totals` are there at the end."""
        options = self.options
        number, groups, penalty = options.num_return_sequences, options.num_beam_groups, options.diversity_penalty
        size = options.num_beams // groups
        logits_BV, histories = self._start()
        if groups > 1:
            copies = [i for i in range(len(histories)) for _ in range(groups)]
            self.decoder.select(copies)
            logits_BV = logits_BV[torch.tensor(copies, device=logits_BV.device)]
            histories = [histories[i] for i in copies]
        searches = [_Search(self, size, i * size, [(history, 0.0)]) for i, history in enumerate(histories)]
        active = searches
        while active:
            running = [beam for search in active for beam in search.running]
            before = [history for history, _ in running]
            logs_BV = self.rules.scores(logits_BV.log_softmax(-1), before)
            if watch is not None:
                self._show(watch, active, before, logits_BV, logs_BV)
            scores_BV = logs_BV + torch.tensor([[total] for _, total in running]).to(logs_BV)
            sizes = [len(search.running) for search in active]
            firsts = [0, *itertools.accumulate(sizes)]
            going, chosen = [], dict[int, list[int]]()  # by prompt, the tokens that groups before have chosen
            for search, part in zip(active, scores_BV.split(sizes), strict=True):
                earlier = chosen.setdefault(search.first // options.num_beams, [])
                if earlier and penalty:
                    counts = torch.tensor(earlier, device=part.device).bincount(minlength=part.shape[1])
                    part = part - penalty * counts.to(part)
                going.append(search.advance(part))
                earlier += [history.ids[-1] for history, _ in search.running] if going[-1] else []
            active = [search for search, beams in zip(active, going, strict=True) if beams]
            if active:
                pairs = zip(firsts, going, strict=False)
                self.decoder.select([first + beam for first, beams in pairs for beam in beams])
                yield
                logits_BV = self.decoder.step([history.ids[-1] for search in active for history, _ in search.running])
        best = []
        for i in range(0, len(searches), groups):
            found = [beam for search in searches[i : i + groups] for beam in search.finished]
            finished = sorted(found, key=lambda beam: -beam[1])
            if len(finished) < number:
                raise InputError(
                    f"num_return_sequences is {number} and beam search found {len(finished)} continuations of a "
                    "prompt; the options leave no more"
                )
            best += finished[:number]
        self.texts, self.totals = [history for history, _ in best], [score for _, score in best]

    def _show(
        self, watch: Callable[[Step], None], active: list[_Search], before: list[History], logits: Tensor, logs: Tensor
    ) -> None:
        """A step of a beam search; the one beam that a prompt begins with stands in all rows."""
        counts = [len(search.running) for search in active]
        firsts = [0, *itertools.accumulate(counts)]
        places = [
            (search.first + row, first + min(row, count - 1))
            for search, first, count in zip(active, firsts, counts, strict=False)
            for row in range(search.beams if not before[first].length else count)
        ]
        taken = torch.tensor([at for _, at in places], device=logs.device)
        tokens: list[int] = []
        watch(Step([row for row, _ in places], tokens, [before[at] for _, at in places], logits[taken], logs[taken]))

    def ends(self, history: History) -> bool:
        return is_over(history, self.options, self.rules, self.tokenizer)

    def _start(self) -> tuple[Tensor, list[History]]:
        logits_BV = self.decoder.start(max(self.limits, default=0))
        given = self.rules.handed.given or self.decoder.prompts
        prompts = zip(self.decoder.prompts, self.limits, given, strict=True)
        return logits_BV, [
            History(list(prompt), len(prompt), limit, i, row) for i, (prompt, limit, row) in enumerate(prompts)
        ]

    def _follow(self) -> Iterator[Step]:
        logits_BV, histories = self._start()
        copies = [i for i in range(len(histories)) for _ in range(self.options.num_return_sequences)]
        if len(copies) > len(histories):
            self.decoder.select(copies)
            logits_BV = logits_BV[torch.tensor(copies, device=logits_BV.device)]
            histories = [
                dataclasses.replace(histories[i], ids=list(histories[i].ids), number=number)
                for number, i in enumerate(copies)
            ]
        self.texts = self.rules.texts = histories
        draw = Draw(len(copies), self.generator) if self.options.do_sample else None
        texts = list(range(len(copies)))
        while True:
            scores_BV = self.rules.scores(logits_BV, histories)
            tokens = (scores_BV.argmax(-1) if draw is None else draw(scores_BV, texts)).tolist()
            for history, token in zip(histories, tokens, strict=True):
                history.ids.append(token)
            step = Step(texts, tokens, histories, logits_BV, scores_BV)
            if self.scores is not None:
                self.scores.append(step.of_all(scores_BV, len(copies)))
            ended = self.rules.ended(histories, self.scores and tuple(self.scores))
            going = [i for i, history in enumerate(histories) if not ended[i] and not self.ends(history)]
            yield step
            if not going:
                return
            if len(going) < len(texts):
                self.decoder.select(going)
                texts, tokens = [texts[i] for i in going], [tokens[i] for i in going]
                histories = [histories[i] for i in going]
            logits_BV = self.decoder.step(tokens)


def is_over(history: History, options: GenerationOptions, rules: Rules, tokenizer: Tokenizer | None) -> bool:
    """Whether a text ends with its last token."""
    if history.length >= history.limit or history.ids[-1] in options.eos_token_id or rules.late:
        return True
    return tokenizer is not None and holds_stop(tokenizer, options.stop_strings, history.new)


@dataclasses.dataclass
class _Search:
    """Beam search on one prompt: the beams that go on, and the best finished ones, with their scores, best first.

    It has this number of beams, of which the first is in the row `first`.
    """

    generation: Generation
    beams: int
    first: int
    running: list[tuple[History, float]]
    finished: list[tuple[History, float]] = dataclasses.field(default_factory=list)

    def advance(self, scores_BV: Tensor) -> list[int]:
        """Take the best continuations by the scores of all; which present beams go on, none at the end."""
        options = self.generation.options
        beams, penalty, ends = self.beams, options.length_penalty, self.generation.ends
        rules, keep = self.generation.rules, self.generation.scores is not None
        length = self.running[0][0].length + 1
        going: list[tuple[int, History, float]] = []
        ended: list[tuple[History, float]] = []
        for rank, (beam, token, score) in enumerate(self._candidates(scores_BV)):
            before = self.running[beam][0]
            path = (*before.beams, self.first + beam) if keep else ()
            history = dataclasses.replace(before, ids=[*before.ids, token], beams=path)
            if not ends(history) and not (rules.handed.criteria and rules.ended([history], None)[0]):
                going.append((beam, history, score))
            elif rank < beams:
                ended.append((history, score / length**penalty))
        if len(self.finished) < beams or options.early_stopping is not True:
            self.finished = sorted([*self.finished, *ended], key=lambda beam: -beam[1])[:beams]
        going = sorted(going, key=lambda beam: -beam[2])[:beams]
        if not going:
            return []
        self.running = [(history, score) for _, history, score in going]
        if len(self.finished) == beams:
            far = going[0][1].limit if options.early_stopping == "never" and penalty > 0 else length
            if options.early_stopping is True or going[0][2] / far**penalty <= self.finished[-1][1]:
                return []
        return [beam for beam, _, _ in going]

    def _candidates(self, scores_BV: Tensor) -> list[tuple[int, int, float]]:
        """Beam, token and log-probability of the best or drawn continuations, more than `num_beams`."""
        options, generator = self.generation.options, self.generation.generator
        assert not isinstance(generator, Sequence)
        vocabulary, flat = scores_BV.shape[1], scores_BV.flatten()
        # Enough that, should each way to end be among the best of each beam, enough others remain.
        wanted = max(2, 1 + len(options.eos_token_id)) * self.beams
        possible = min(wanted, int(flat.isfinite().sum()))
        if not possible:
            return []
        if options.do_sample:
            likely = flat.softmax(-1).to(place_of(generator, flat))
            chosen = torch.multinomial(likely, possible, generator=generator).to(flat.device)
        else:
            chosen = flat.topk(possible).indices
        pairs = zip(chosen.tolist(), flat[chosen].tolist(), strict=True)
        return [(index // vocabulary, index % vocabulary, score) for index, score in pairs]
