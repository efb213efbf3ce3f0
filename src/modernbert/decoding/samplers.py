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
    """A text so far.

    Attributes:
        ids: of the prompt, then of the continuation.
        prompt: how many are the prompt's.
        limit: how many it may get.
        number: of the text, or in a beam search of the prompt.
        given: the prompt as it was given, padding included.
        beams: for each new token the row of the beam that it goes on from.
    """

    ids: list[int]
    prompt: int
    limit: int
    number: int = 0
    given: Sequence[int] = ()
    beams: tuple[int, ...] = ()

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


def reward_prompt(scores_BV: Tensor, histories: Sequence[History], penalty: float) -> Tensor:
    """Make tokens of the prompt likelier: positive scores are multiplied, negative ones divided."""
    prompts = [dataclasses.replace(history, ids=history.ids[: history.prompt]) for history in histories]
    return penalize_repetition(scores_BV, prompts, 1 / penalty)


def forbid_repeated_ngrams(
    scores_BV: Tensor, histories: Sequence[History], size: int, of_prompt: bool = False
) -> Tensor:
    """Never complete `size` tokens in a row that occur already, or that occur in the prompt."""
    out = scores_BV.clone()
    for scores_V, history in zip(out, histories, strict=True):
        ids = history.ids
        start = ids[max(0, len(ids) - size + 1) :] if size > 1 else []
        ids = ids[: history.prompt] if of_prompt else ids
        banned = [ids[i] for i in range(size - 1, len(ids)) if ids[i - size + 1 : i] == start]
        scores_V[torch.tensor(banned, dtype=torch.int64, device=out.device)] = _NEVER
    return out


def forbid_end(
    scores_BV: Tensor, histories: Sequence[History], eos_ids: Sequence[int], until: int, whole: int = 0
) -> Tensor:
    """Never end a text before it has this many new tokens, and as a whole that many with its prompt as it was given."""
    wanted = [max(until, whole - len(history.given)) for history in histories]
    early = [i for i, history in enumerate(histories) if history.length < wanted[i]]
    if not early:
        return scores_BV
    out = scores_BV.clone()
    ids = [i for i in eos_ids if i < scores_BV.shape[1]]  # configurations may name ids past the vocabulary
    out[torch.tensor(early, device=out.device)[:, None], torch.tensor(ids, device=out.device)] = _NEVER
    return out


def forbid(scores_BV: Tensor, histories: Sequence[History], ids: Sequence[int], first: bool) -> Tensor:
    """Never take these ids, or never as the first."""
    out, known = scores_BV.clone(), [i for i in ids if i < scores_BV.shape[1]]
    for scores_V, history in zip(out, histories, strict=True):
        if not first or not history.length:
            scores_V[known] = _NEVER
    return out


def force(scores_BV: Tensor, histories: Sequence[History], ids: Sequence[int], last: bool) -> Tensor:
    """Only take these ids as the last token that the limit leaves, or after a prompt of one token."""
    out, known = scores_BV.clone(), [i for i in ids if i < scores_BV.shape[1]]
    for scores_V, history in zip(out, histories, strict=True):
        if known and (history.length == history.limit - 1 if last else len(history.ids) == 1):
            scores_V.fill_(_NEVER)[known] = 0.0
    return out


def add_bias(
    scores_BV: Tensor, histories: Sequence[History], biases: Sequence[tuple[tuple[int, ...], float]]
) -> Tensor:
    """Add to the scores of ids that complete one of these sequences."""
    out = scores_BV.clone()
    for scores_V, history in zip(out, histories, strict=True):
        for ids, bias in biases:
            if ids[-1] < len(scores_V) and (len(ids) == 1 or tuple(history.ids[1 - len(ids) :]) == ids[:-1]):
                scores_V[ids[-1]] += bias
    return out


def hasten_end(
    scores_BV: Tensor, histories: Sequence[History], eos_ids: Sequence[int], after: float, factor: float
) -> Tensor:
    """Raise the scores of the end, the more the further a text is past this many new tokens."""
    out, ids = scores_BV.clone(), [i for i in eos_ids if i < scores_BV.shape[1]]
    for scores_V, history in zip(out, histories, strict=True):
        if history.length > after:
            more = scores_V[ids].abs() * (factor ** (history.length - after) - 1)
            scores_V[ids] += more.masked_fill(more.isinf(), 0.0)
    return out


def replace_invalid(scores_BV: Tensor, histories: Sequence[History]) -> Tensor:
    """Finite numbers instead of NaN and infinite ones."""
    return scores_BV.nan_to_num(0.0)


def normalize(scores_BV: Tensor, histories: Sequence[History]) -> Tensor:
    """Log-probabilities of scores."""
    return scores_BV.log_softmax(-1)


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
    return _without(scores_BV, probabilities < p * probabilities.amax(-1, keepdim=True), least)


def keep_typical(scores_BV: Tensor, histories: Sequence[History], p: float, least: int = 1) -> Tensor:
    """Keep the fewest tokens whose surprise is nearest to the expected one and whose probabilities reach p.

    Source: locally typical sampling, arXiv:2202.00666.
    """
    logs = scores_BV.log_softmax(-1)
    probabilities = logs.exp()
    away, order = (-logs + (probabilities * logs).nansum(-1, keepdim=True)).abs().sort(dim=-1)
    before = (probabilities.gather(1, order).cumsum(-1) < p).sum(-1, keepdim=True).clamp(max=logs.shape[1] - 1)
    far = away > away.gather(1, before)
    far[:, :least] = False
    return scores_BV.masked_fill(torch.zeros_like(far).scatter(1, order, far), _NEVER)


def keep_above(
    scores_BV: Tensor, histories: Sequence[History], bound: float, by_entropy: bool, least: int = 1
) -> Tensor:
    """Keep tokens of at least this probability, and the `least` best ones; a lower one where the entropy is high.

    Source: epsilon and eta sampling, arXiv:2210.15191.
    """
    logs = scores_BV.log_softmax(-1)
    bound_B1 = torch.full_like(logs[:, :1], bound)
    if by_entropy:
        falling_B1 = bound**0.5 * (logs.exp() * logs).nansum(-1, keepdim=True).exp()
        bound_B1 = torch.minimum(bound_B1, falling_B1)
    return _without(scores_BV, logs.exp() < bound_B1, least)


def _without(scores_BV: Tensor, dropped_BV: Tensor, least: int) -> Tensor:
    """Scores without what is dropped; the `least` best ones stay."""
    best = scores_BV.topk(min(least, scores_BV.shape[-1])).indices
    return scores_BV.masked_fill(dropped_BV.scatter(1, best, False), _NEVER)


def compose(
    options: GenerationOptions, guides: Sequence[Sampler] = (), allows: Sequence[Sampler] = (),
    own: Sequence[Sampler] = (),
) -> list[Sampler]:  # fmt: skip
    """All that the options ask for, in the order that they are applied in, with what callers hand over between it.

    Args:
        options: of generation.
        guides: come first.
        allows: come before tokens are forced.
        own: come before what is for draws alone.
    """
    # Beams that all end at once leave others to go on with.
    least = 1 if options.num_beams == 1 else max(2, 1 + len(options.eos_token_id))
    draws, until, whole = options.do_sample, options.min_new_tokens, options.min_length
    decay, prompt_ngrams = options.exponential_decay_length_penalty, options.encoder_no_repeat_ngram_size
    penalties: list[tuple[bool, Sampler]] = [
        (bool(options.sequence_bias), partial(add_bias, biases=[pair for pair in options.biases if pair[1] > _NEVER])),
        (options.encoder_repetition_penalty != 1.0, partial(reward_prompt, penalty=options.encoder_repetition_penalty)),
        (options.repetition_penalty != 1.0, partial(penalize_repetition, penalty=options.repetition_penalty)),
        (options.no_repeat_ngram_size > 0, partial(forbid_repeated_ngrams, size=options.no_repeat_ngram_size)),
        (prompt_ngrams > 0, partial(forbid_repeated_ngrams, size=prompt_ngrams, of_prompt=True)),
        (bool(options.bad_words_ids), partial(add_bias, biases=[pair for pair in options.biases if pair[1] == _NEVER])),
        (
            bool(options.eos_token_id) and until + whole > 0,
            partial(forbid_end, eos_ids=options.eos_token_id, until=until, whole=whole),
        ),
    ]
    forced = [] if options.forced_bos_token_id is None else [options.forced_bos_token_id]
    rules: list[tuple[bool, Sampler]] = [
        (bool(forced), partial(force, ids=forced, last=False)),
        (bool(options.forced_eos_token_id), partial(force, ids=options.forced_eos_token_id, last=True)),
        (options.remove_invalid_values, replace_invalid),
        (bool(decay), partial(hasten_end, eos_ids=options.eos_token_id, after=sum(decay[:1]), factor=sum(decay[1:]))),
        (bool(options.suppress_tokens), partial(forbid, ids=options.suppress_tokens, first=False)),
        (bool(options.begin_suppress_tokens), partial(forbid, ids=options.begin_suppress_tokens, first=True)),
    ]
    drawing: list[tuple[bool, Sampler]] = [
        (draws and options.temperature != 1.0, partial(scale, temperature=options.temperature)),
        (draws and options.top_k > 0, partial(keep_top_k, k=options.top_k, least=least)),
        (draws and options.top_p < 1.0, partial(keep_top_p, p=options.top_p, least=least)),
        (draws and options.min_p > 0.0, partial(keep_min_p, p=options.min_p, least=least)),
        (draws and options.typical_p < 1.0, partial(keep_typical, p=options.typical_p, least=least)),
        (
            draws and options.epsilon_cutoff > 0.0,
            partial(keep_above, bound=options.epsilon_cutoff, by_entropy=False, least=least),
        ),
        (
            draws and options.eta_cutoff > 0.0,
            partial(keep_above, bound=options.eta_cutoff, by_entropy=True, least=least),
        ),
        (options.renormalize_logits, normalize),
    ]
    first, then, last = ([sampler for on, sampler in part if on] for part in (penalties, rules, drawing))
    return [*guides, *first, *allows, *then, *own, *last]


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
