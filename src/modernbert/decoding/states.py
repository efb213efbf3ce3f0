"""Hidden states and attention weights of every step of a generation, from passes without a cache over what was read.

Shapes: B rows, S columns, L tokens of the longest row, M hidden size, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modernbert.decoding.loops import Step
from modernbert.decoding.options import GenerateOptions

Parts = list[tuple[Tensor, ...]]


class States:
    """Passes over what a generation read.

    Args:
        model: reads.
        prompts: vectors of each prompt's tokens, (S, M).
        mask_BS: which columns of the prompts are tokens.
        wanted: which states.
    """

    def __init__(self, model: Any, prompts: Sequence[Tensor], mask_BS: Tensor, wanted: GenerateOptions) -> None:
        self.model, self.prompts, self.mask_BS, self.wanted = model, prompts, mask_BS, wanted
        self.embed: Callable[[Tensor], Tensor] = model.get_input_embeddings()

    def of_texts(self, new: Sequence[list[int]]) -> tuple[Parts, Parts]:
        """Hidden states and attention weights of each step: of all texts by one pass."""
        read, first = [ids[:-1] for ids in new], self.mask_BS.shape[1]
        spans = [(0, first), *((first + i, first + i + 1) for i in range(max(map(len, read))))]
        return self._read(dict(enumerate(read)), len(read), spans)

    def of_beams(self, steps: Sequence[Step]) -> tuple[Parts, Parts]:
        """Likewise of a beam search, whose beams come and go: by one pass a step."""
        states, weights = Parts(), Parts()
        for number, step in enumerate(steps):
            read = {row: history.new for row, history in zip(step.texts, step.histories, strict=True)}
            last = self.mask_BS.shape[1] + number
            found = self._read(read, len(self.prompts) * self.wanted.num_beams, [(last - 1 if number else 0, last)])
            states, weights = states + found[0], weights + found[1]
        return states, weights

    @torch.no_grad()
    def _read(self, read: dict[int, list[int]], size: int, spans: Sequence[tuple[int, int]]) -> tuple[Parts, Parts]:
        """States of the columns `spans` of rows, each of a prompt and these new ids; zeros in all others."""
        each, device = size // len(self.prompts), self.model.device
        rows, width = sorted(read), max(map(len, read.values()))
        vectors = [
            torch.cat([self.prompts[row // each], self.embed(torch.tensor(read[row], device=device).long())])
            for row in rows
        ]
        real_BL = torch.zeros((len(rows), max(map(len, vectors))), dtype=torch.bool)
        mask_BS = torch.zeros((size, self.mask_BS.shape[1] + width), dtype=torch.bool)
        for i, row in enumerate(rows):
            real_BL[i, : len(vectors[i])] = True
            mask_BS[row, : self.mask_BS.shape[1]] = self.mask_BS[row // each]
            mask_BS[row, self.mask_BS.shape[1] :][: len(read[row])] = True
        out = self.model(
            inputs_embeds=nn.utils.rnn.pad_sequence(vectors, batch_first=True),
            attention_mask=real_BL.to(device),
            output_attentions=self.wanted.output_attentions,
            output_hidden_states=self.wanted.output_hidden_states,
            return_dict=True,
            use_cache=False,
        )
        mask_BS = mask_BS.to(device)
        at = torch.zeros(size, dtype=torch.int64, device=device)
        at[rows] = torch.arange(len(rows), device=device)
        rank_BS, at_B1 = (mask_BS.cumsum(1) - 1).clamp(min=0), at[:, None]
        seen_B1SS = mask_BS[:, None, :, None] & mask_BS[:, None, None]
        hidden = [x_BLM[at_B1, rank_BS] * mask_BS[:, :, None] for x_BLM in out.hidden_states or ()]
        attended = [
            w_BHLL[at_B1[:, None], :, rank_BS[:, :, None], rank_BS[:, None]].permute(0, 3, 1, 2) * seen_B1SS
            for w_BHLL in out.attentions or ()
        ]
        return (
            [tuple(x[:, start:end] for x in hidden) for start, end in spans if hidden],
            [tuple(w[:, :, start:end, :end] for w in attended) for start, end in spans if attended],
        )
