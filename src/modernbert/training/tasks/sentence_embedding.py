"""Vectors of texts that belong together, compared by their cosine.

Shapes: B pairs of a step, R rows of a forward pass, N candidates, D dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert.errors import InputError
from modernbert.models.formats import refuse_to_train
from modernbert.models.sentence_encoder import SentenceEncoder
from modernbert.training.contract import Batch
from modernbert.training.tasks.contrastive import Contrastive
from modernbert.training.tasks.options import FinetuneOptions


class SentenceEmbedding(Contrastive):
    """Anchors find their positives by the cosine of vectors, and of their first dimensions where these are trained.

    Source: Matryoshka dimensions, arXiv:2205.13147.
    """

    name = "sentence-embedding"
    auto_model = SentenceEncoder

    def load(self, name: str | Path, options: FinetuneOptions) -> SentenceEncoder:
        """A sentence encoder; a bare encoder gets a pooling."""
        model = SentenceEncoder.from_pretrained(
            name, dtype=torch.float32, revision=options.revision, attn_implementation=options.attn_implementation
        )
        refuse_to_train(model.config, str(name))
        self.prompts = {**model.settings.prompts, **self.prompts}
        poolings = model.settings.poolings if model.is_layout else (self.options.pooling,)
        model.settings = dataclasses.replace(model.settings, prompts=self.prompts, poolings=poolings)
        wide = [d for d in self.options.matryoshka if not 0 < d < model.dimensions]
        if wide:
            raise InputError(f"matryoshka is {wide[0]}; vectors have {model.dimensions} dimensions, take fewer")
        return model

    def similarities(self, vectors: Tensor, is_anchor_R: Tensor, step: Batch) -> list[Tensor]:
        found = []
        for width in (*self.options.matryoshka, vectors.shape[1]):
            unit_RD = F.normalize(vectors[:, :width].float(), dim=-1)
            found.append(unit_RD[is_anchor_R] @ unit_RD[~is_anchor_R].mT)
        return found

    def compared(self, anchors: list[Any], documents: list[Any]) -> Iterator[tuple[str, Iterator[Tensor]]]:
        anchors_BD, documents_ND = torch.cat(anchors), torch.cat(documents)
        for width in (*self.options.matryoshka, anchors_BD.shape[1]):
            unit_BD, unit_ND = (F.normalize(x[:, :width], dim=-1) for x in (anchors_BD, documents_ND))
            suffix = "" if width == anchors_BD.shape[1] else f"_{width}"
            yield suffix, (part_BD @ unit_ND.mT for part_BD in unit_BD.split(1024))
