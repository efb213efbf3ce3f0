"""fill-mask: the most likely tokens in the place of each mask."""

from __future__ import annotations

import logging
from typing import Any

import torch

from modernbert.auto import AutoModelForMaskedLM
from modernbert.errors import InputError
from modernbert.models.masked_lm import ModernBertForMaskedLM
from modernbert.pipelines.base import Pipeline, _short

logger = logging.getLogger(__name__)


class FillMaskPipeline(Pipeline):
    """Fills the masks of texts.

    A call takes a text, a list of texts or an iterable of them, and the options `top_k` (answers a mask, 5) and
    `targets` (the only words to consider). Where a mask stands for a word after a space, a target means the word
    with that space, which is how the vocabulary spells it.

    For each text it gives a list of {"score", "token", "token_str", "sequence"}, best first; with several masks in
    the text, one such list a mask, in order. "sequence" is the text with this mask filled; with several masks it
    keeps the special tokens, the other masks among them. A list of texts gives a list of answers, a list of one text
    too.
    """

    auto_model = AutoModelForMaskedLM.from_pretrained
    options = ("top_k", "targets")
    model: Any

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        if not isinstance(model, ModernBertForMaskedLM):
            raise InputError(f"fill-mask needs a masked language model; this is a {type(model).__name__}")
        super().__init__(model, tokenizer, **options)
        if tokenizer.mask_token_id is None:
            raise InputError("fill-mask needs a tokenizer with a mask token; this one has none")

    def prepare(self, text: str, settings: dict[str, Any]) -> tuple[list[int], list[list[int]]]:
        """Ids of the text, and for each of its masks the ids of the targets, if there are any."""
        ids = self.tokenize(text)
        mask = self.tokenizer.mask_token_id
        masks = ids.count(mask)
        if not masks:
            raise InputError(
                f"there is no {self.tokenizer.mask_token} in {_short(text)!r}; write it where a word is missing"
            )
        top_k = settings.get("top_k", 5)
        if not isinstance(top_k, int) or top_k < 1:
            raise InputError(f"top_k is {top_k!r}; it must be a whole number of at least 1")
        targets = settings.get("targets")
        if targets is None:
            return ids, []
        words = [targets] if isinstance(targets, str) else list(targets)
        if not words or not all(isinstance(w, str) and w.strip() for w in words):
            raise InputError(f"targets is {targets!r}; give a word or a list of words")
        before = text.split(self.tokenizer.mask_token)[:masks]
        return ids, [[self._target(word, left[-1:].isspace()) for word in words] for left in before]

    def _target(self, word: str, after_space: bool) -> int:
        """Id of the token that a target means; the first one's where the vocabulary has no single token for it."""
        spelled = f" {word}" if after_space and not word[0].isspace() else word
        ids = self.tokenizer(spelled, add_special_tokens=False).input_ids
        if len(ids) > 1:
            first = self.tokenizer.decode([ids[0]])
            logger.warning(
                "target %r is %d tokens of this vocabulary; the first one, %r, is scored", spelled, len(ids), first
            )
        return int(ids[0])

    def answer(self, rows: list[tuple[list[int], list[list[int]]]], settings: dict[str, Any]) -> list[Any]:
        """Scores at the masks alone: no logits are made elsewhere."""
        ids_T, cu_seqlens = self.pack([ids for ids, _ in rows])
        encoder = self.model.model
        hidden = encoder.encode(encoder.pack_inputs(ids_T, None, cu_seqlens=cu_seqlens)).last_hidden_state
        masked = (ids_T == self.tokenizer.mask_token_id).nonzero().squeeze(1)
        probabilities = self.model.decoder(self.model.head(hidden[masked])).float().softmax(-1).cpu()
        answers, place = [], 0
        for ids, targets in rows:
            positions = [i for i, token in enumerate(ids) if token == self.tokenizer.mask_token_id]
            of_text = []
            for i, position in enumerate(positions):
                row = probabilities[place]
                place += 1
                of_text.append(
                    self._ranked(ids, position, row, targets[i] if targets else None, settings, len(positions))
                )
            answers.append(of_text[0] if len(of_text) == 1 else of_text)
        return answers

    def _ranked(
        self,
        ids: list[int],
        position: int,
        probabilities: torch.Tensor,
        targets: list[int] | None,
        settings: dict[str, Any],
        masks: int,
    ) -> list[dict[str, Any]]:
        candidates = torch.arange(len(probabilities)) if targets is None else torch.tensor(list(dict.fromkeys(targets)))
        best = probabilities[candidates].topk(min(settings.get("top_k", 5), len(candidates)))
        out = []
        for score, token in zip(best.values.tolist(), candidates[best.indices].tolist(), strict=True):
            filled = [*ids[:position], token, *ids[position + 1 :]]
            out.append(
                {
                    "score": score,
                    "token": token,
                    "token_str": self.tokenizer.decode([token]),
                    "sequence": self.tokenizer.decode(filled, skip_special_tokens=masks == 1),
                }
            )
        return out
