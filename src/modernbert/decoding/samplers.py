"""Samplers: small functions from scores to scores, applied one after another, and the draw at the end.

Each takes float32 scores and the texts so far, and returns scores; those that it is given stay as they are.

Shapes: B texts, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from modernbert.decoding.options import GenerationOptions

_NEVER = float("-inf")


@dataclasses.dataclass(frozen=True)
class History:
    """A text so far: its ids, of which the first `prompt` are the prompt's, and how many it may get."""

    ids: list[int]
    prompt: int
    limit: int

    @property
    def length(self) -> int:
        return len(self.ids) - self.prompt

    @property
    def new(self) -> list[int]:
        return self.ids[self.prompt :]


Generators = torch.Generator | Sequence[torch.Generator] | None
Sampler = Callable[[Tensor, Sequence[History]], Tensor]


def penalize_repetition(scores_BV: Tensor, histories: Sequence[History], penalty: float) -> Tensor:
    """Make tokens that occur already less likely: positive scores are divided, negative ones multiplied.

    Source: CTRL, arXiv:1909.05858.
    """
    out = scores_BV.clone()
    for scores_V, history in zip(out, histories, strict=True):
        seen = torch.tensor(list(set(history.ids)), dtype=torch.int64, device=out.device)
        scores_V[seen] = torch.where(scores_V[seen] < 0, scores_V[seen] * penalty, scores_V[seen] / penalty)
    return out


def forbid_repeated_ngrams(scores_BV: Tensor, histories: Sequence[History], size: int) -> Tensor:
    """Never complete `size` tokens in a row that occur already."""
    out = scores_BV.clone()
    for scores_V, history in zip(out, histories, strict=True):
        ids = history.ids
        start = ids[max(0, len(ids) - size + 1) :] if size > 1 else []
        banned = [ids[i] for i in range(size - 1, len(ids)) if ids[i - size + 1 : i] == start]
        scores_V[torch.tensor(banned, dtype=torch.int64, device=out.device)] = _NEVER
    return out


def forbid_end(scores_BV: Tensor, histories: Sequence[History], eos_ids: Sequence[int], until: int) -> Tensor:
    """Never end a text before it has this many new tokens."""
    early = [i for i, history in enumerate(histories) if history.length < until]
    if not early:
        return scores_BV
    out = scores_BV.clone()
    ids = [i for i in eos_ids if i < scores_BV.shape[1]]  # configurations may name ids past the vocabulary
    out[torch.tensor(early, device=out.device)[:, None], torch.tensor(ids, device=out.device)] = _NEVER
    return out


def scale(scores_BV: Tensor, histories: Sequence[History], temperature: float) -> Tensor:
    """Sharpen (below 1) or flatten (above 1) the distribution."""
    return scores_BV / temperature


def keep_top_k(scores_BV: Tensor, histories: Sequence[History], k: int, least: int = 1) -> Tensor:
    """Keep the k best scores, `least` at the least, and those equal to the last of them."""
    least_B1 = scores_BV.topk(min(max(k, least), scores_BV.shape[-1])).values[:, -1:]
    return scores_BV.masked_fill(scores_BV < least_B1, _NEVER)


def keep_top_p(scores_BV: Tensor, histories: Sequence[History], p: float, least: int = 1) -> Tensor:
    """Keep the fewest best scores whose probabilities sum to p or more, `least` at the least.

    Source: nucleus sampling, arXiv:1904.09751.
    """
    rising, order = scores_BV.sort(dim=-1)
    tail = rising.softmax(-1).cumsum(-1) <= 1 - p
    tail[:, -least:] = False
    return scores_BV.masked_fill(torch.zeros_like(tail).scatter(1, order, tail), _NEVER)


def keep_min_p(scores_BV: Tensor, histories: Sequence[History], p: float, least: int = 1) -> Tensor:
    """Keep tokens whose probability is at least p times the best one's, and the `least` best ones.

    Source: arXiv:2407.01082.
    """
    probabilities = scores_BV.softmax(-1)
    unlikely = probabilities < p * probabilities.amax(-1, keepdim=True)
    best = probabilities.topk(min(least, scores_BV.shape[-1])).indices
    return scores_BV.masked_fill(unlikely.scatter(1, best, False), _NEVER)


def compose(options: GenerationOptions) -> list[Sampler]:
    """All that the options ask for, in the order that they are applied in."""
    # Beams that all end at once leave others to go on with.
    least = 1 if options.num_beams == 1 else max(2, 1 + len(options.eos_token_id))
    draws, until = options.do_sample, options.min_new_tokens if options.eos_token_id else 0
    samplers: list[tuple[bool, Sampler]] = [
        (options.repetition_penalty != 1.0, partial(penalize_repetition, penalty=options.repetition_penalty)),
        (options.no_repeat_ngram_size > 0, partial(forbid_repeated_ngrams, size=options.no_repeat_ngram_size)),
        (until > 0, partial(forbid_end, eos_ids=options.eos_token_id, until=until)),
        (draws and options.temperature != 1.0, partial(scale, temperature=options.temperature)),
        (draws and options.top_k > 0, partial(keep_top_k, k=options.top_k, least=least)),
        (draws and options.top_p < 1.0, partial(keep_top_p, p=options.top_p, least=least)),
        (draws and options.min_p > 0.0, partial(keep_min_p, p=options.min_p, least=least)),
    ]
    return [sampler for wanted, sampler in samplers if wanted]


class Draw:
    """Draws one token a text by their probabilities: the largest of p / e, with e drawn from the exponential
    distribution, is token i with probability p_i.

    One generator draws for all `texts` of the batch at every step, those that are finished too, so that a seed means
    the same whoever finishes first. With one a text, a text's draws are its own. None is PyTorch's global one.
    """

    def __init__(self, texts: int, generator: Generators) -> None:
        self.texts, self.generator = texts, generator

    def __call__(self, scores_BV: Tensor, texts: Sequence[int]) -> Tensor:
        """One token of each of these texts, (B,), by its scores."""
        size = scores_BV.shape[1]
        if isinstance(self.generator, Sequence):
            noise_BV = torch.cat([_noise(1, size, self.generator[text], scores_BV) for text in texts])
        else:
            noise_BV = _noise(self.texts, size, self.generator, scores_BV)
            if len(texts) < self.texts:
                noise_BV = noise_BV[torch.tensor(texts, device=noise_BV.device)]
        return (scores_BV.softmax(-1) / noise_BV).argmax(-1)


def _noise(texts: int, size: int, generator: torch.Generator | None, scores: Tensor) -> Tensor:
    noise = torch.empty((texts, size), device=place_of(generator, scores))
    return noise.exponential_(generator=generator).to(scores.device)


def place_of(generator: torch.Generator | None, scores: Tensor) -> torch.device:
    """Where to draw: a generator draws on its own device, which a card's scores need not share."""
    return scores.device if generator is None else generator.device
