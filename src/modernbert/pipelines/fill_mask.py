"""fill-mask: the most likely tokens in the place of each mask."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch

from modernbert.auto import AutoModelForMaskedLM
from modernbert.checks import check_text, short
from modernbert.errors import InputError, shown
from modernbert.models.heads import ModernBertForMaskedLM
from modernbert.pipelines.base import Job, Pipeline, Row
from modernbert.pipelines.options import FillMaskOptions

logger = logging.getLogger(__name__)

_MASKS_TOGETHER = 256  # whose scores over the whole vocabulary are alive at once

Best = tuple[list[float], list[int]]  # scores of a mask and their tokens, best first


@dataclasses.dataclass
class MaskedRow(Row):
    """A text, the places of its masks, and for each mask the ids of the targets, if there are any."""

    places: list[int]
    targets: list[list[int]]


class FillMaskPipeline(Pipeline[FillMaskOptions, MaskedRow, list[Best]]):
    """Fills the masks of texts.

    A call takes a text, a list of texts or an iterable of them. A target means what the vocabulary has one token for:
    the word as it stands, or with a space before it, which is how words within a text are spelled. If there are both,
    the mask decides: one after a space means the word with the space.

    For each text it gives a list of {"score", "token", "token_str", "sequence"}, best first; with several masks in
    the text, one such list a mask, in order. "sequence" is the text with this mask filled; with several masks it
    keeps the special tokens, the other masks among them. A list of texts gives a list of answers, a list of one text
    too.
    """

    task = "fill-mask"
    options = FillMaskOptions
    auto_model = AutoModelForMaskedLM
    models = (ModernBertForMaskedLM,)
    needs = "an encoder for masked language modelling"

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        if tokenizer.mask_token_id is None:
            raise InputError("fill-mask needs a tokenizer with a mask token; this one has none")

    def resolve(self, options: FillMaskOptions) -> FillMaskOptions:
        if options.targets == []:
            raise InputError("targets is []; give a word or a list of words")
        for word in options.targets or ():
            check_text(word, "a target")
        return options

    def prepare(self, items: list[Any], options: FillMaskOptions) -> list[list[MaskedRow]]:
        rows = []
        for text, encoding in zip(items, self.tokenize(items, **options.tokenizing), strict=True):
            places = [i for i, token in enumerate(encoding.ids) if token == self.tokenizer.mask_token_id]
            if not places:
                raise InputError(
                    f"there is no {self.tokenizer.mask_token} in {short(text)!r}; write it where a word is missing"
                )
            targets: list[list[int]] = [[]] * len(places)
            if options.targets is not None:
                before = text.split(self.tokenizer.mask_token)[: len(places)]
                targets = [[self._target(word, left[-1:].isspace()) for word in options.targets] for left in before]
            rows.append([MaskedRow(encoding.ids, places, targets)])
        return rows

    def _target(self, word: str, after_space: bool) -> int:
        """Id of the token that a target means; the first one's where the vocabulary has no single token for it."""
        spaced = word if word[0].isspace() else f" {word}"
        spellings = [spaced, word] if after_space else [word, spaced]
        tokens = [self.tokenizer(spelled, add_special_tokens=False).input_ids for spelled in spellings]
        single = next((ids for ids in tokens if len(ids) == 1), None)
        if single is not None:
            return int(single[0])
        # A first token that is a space alone says nothing of the word.
        firsts = [(ids, self.tokenizer.decode(ids[:1])) for ids in tokens if ids]
        ids, first = next(((ids, first) for ids, first in firsts if first.strip()), (None, ""))
        if ids is None:
            raise InputError(f"targets holds {shown(word)}, which makes no token with this tokenizer")
        logger.warning(
            "target %s is %d tokens of this vocabulary; the first one, %s, is scored",
            shown(word),
            len(ids),
            shown(first),
        )
        return int(ids[0])

    def run(self, rows: list[MaskedRow], options: FillMaskOptions) -> list[list[Best]]:
        """For each mask the best scores and their tokens. No logits are made elsewhere, nor kept."""
        hidden = self.model.model.encode(self.pack(rows)).last_TM
        ids_T = torch.tensor([i for row in rows for i in row.ids])
        masked = (ids_T == self.tokenizer.mask_token_id).nonzero().squeeze(1)
        states = self.model.head(hidden[masked.to(hidden.device)])
        targets = [of_mask for row in rows for of_mask in row.targets]
        best: list[Best] = []
        for first in range(0, len(targets), _MASKS_TOGETHER):
            some = slice(first, first + _MASKS_TOGETHER)
            scores = self.model.decoder(states[some]).float().softmax(-1)
            if options.targets is None:
                found = scores.topk(min(options.top_k, scores.shape[1]))
                best += zip(found.values.tolist(), found.indices.tolist(), strict=True)
                continue
            for scores_V, wanted in zip(scores, targets[some], strict=True):
                best.append(_best(scores_V, wanted, options.top_k))
        rest = iter(best)
        return [[next(rest) for _ in row.places] for row in rows]

    def finish(self, job: Job[MaskedRow, list[Best]], options: FillMaskOptions) -> Any:
        (row,), (best,) = job.rows, job.results
        answers = []
        for place, (scores, tokens) in zip(row.places, best, strict=True):
            of_mask = []
            for score, token in zip(scores, tokens, strict=True):
                filled = [*row.ids[:place], token, *row.ids[place + 1 :]]
                sequence = self.tokenizer.decode(filled, skip_special_tokens=len(row.places) == 1)
                word = self.tokenizer.decode([token])
                of_mask.append({"score": score, "token": token, "token_str": word, "sequence": sequence})
            answers.append(of_mask)
        return answers[0] if len(answers) == 1 else answers


def _best(scores_V: torch.Tensor, targets: list[int], top_k: int) -> Best:
    """The best scores of the targets, and their tokens."""
    candidates = torch.tensor(list(dict.fromkeys(targets)), device=scores_V.device)
    best = scores_V[candidates].topk(min(top_k, len(candidates)))
    return best.values.tolist(), candidates[best.indices].tolist()
