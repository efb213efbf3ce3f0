"""Sparse vectors over the vocabulary, compared by their dot product (SPLADE).

Shapes: B pairs of a step, R rows of a forward pass, N candidates, V entries of the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modernbert.errors import InputError
from modernbert.models.formats import refuse_to_train
from modernbert.retrieval.sparse import SparseEncoder, SparseVector, to_csr
from modernbert.text.tokenizer import Tokenizer
from modernbert.training.contract import Batch
from modernbert.training.examples import Example
from modernbert.training.tasks.contrastive import Contrastive
from modernbert.training.tasks.data import Row
from modernbert.training.tasks.options import FinetuneOptions

_SAMPLE = 64  # documents by which the zero of logits is set


class SparseEmbedding(Contrastive):
    """Anchors find their positives by the dot product of sparse weights, and few weights are left.

    A penalty grows over the first part of the run: the FLOPS that a search takes, which are the squared mean weights of
    all entries, of queries and of documents.

    Source: SPLADE v2, arXiv:2109.10086; FLOPS, arXiv:2004.05665.
    """

    name = "sparse-embedding"
    auto_model = SparseEncoder
    rise = 1.0  # of the penalty, the share of its final weight

    def load(self, name: str | Path, options: FinetuneOptions) -> SparseEncoder:
        """A sparse encoder; a masked language model becomes one."""
        model = SparseEncoder.from_pretrained(
            name, dtype=torch.float32, revision=options.revision, attn_implementation=options.attn_implementation
        )
        refuse_to_train(model.config, str(name))
        if model.static_V is not None:
            raise InputError(f"{name} has static weights for queries; only encoders that read queries are trained")
        self.prompts = {**model.settings.prompts, **self.prompts}
        changes: dict[str, Any] = {"prompts": self.prompts}
        if self.options.top_k is not None:
            changes["top_k"] = self.options.top_k
        if self.options.max_length is not None:
            changes["max_length"] = self.options.max_length
        model.settings = dataclasses.replace(model.settings, **changes)
        self.settings, self.model = model.settings, model
        return model

    def prepare(self, rows: Sequence[Row], training: bool) -> list[Example]:
        """Also set the zero of the logits, of which a masked language model has none, by some of the documents."""
        examples = super().prepare(rows, training)
        if training and examples and not self.model.is_layout and self.options.start_entries:
            step = -(-len(examples) // _SAMPLE)
            texts = [example.rows[1] for example in examples[::step]]
            constant = self.model.thin_out(texts, self.options.start_entries)
            self.notes.append(f"{constant:.2f} is subtracted from all logits: documents begin with few weights")
        return examples

    def set_tokenizer(self, tokenizer: Tokenizer, context: int) -> None:
        super().set_tokenizer(tokenizer, min(context, self.settings.max_length or context))

    def at_step(self, step: int, total: int) -> None:
        rising = self.options.flops_warmup * total
        self.rise = min(1.0, (step + 1) / rising) ** 2 if rising else 1.0

    def similarities(self, vectors: Tensor, is_anchor_R: Tensor, step: Batch) -> list[Tensor]:
        return [vectors[is_anchor_R] @ vectors[~is_anchor_R].mT]

    def penalty(self, vectors: Tensor, is_anchor_R: Tensor) -> Tensor:
        """The FLOPS of queries and of documents, each with its weight."""
        weights = ((is_anchor_R, self.options.query_flops), (~is_anchor_R, self.options.document_flops))
        parts = [weight * vectors[rows].mean(0).square().sum() for rows, weight in weights]
        return self.rise * (parts[0] + parts[1])

    # Evaluation

    def kept(self, answers: Tensor) -> SparseVector:
        """As the pipeline gives it."""
        return SparseVector.of(answers[0], self.settings.top_k)

    def compared(self, anchors: list[Any], documents: list[Any]) -> Iterator[tuple[str, Iterator[Tensor]]]:
        size = anchors[0].dimensions
        queries, found = to_csr(anchors, size), to_csr(documents, size).T.tocsc()
        parts = (queries[i : i + 256] for i in range(0, len(anchors), 256))
        yield "", (torch.from_numpy((some @ found).toarray()) for some in parts)

    def more_metrics(self, anchors: list[Any], documents: list[Any]) -> dict[str, float]:
        """The mean number of entries with a weight."""
        return {"query_entries": _mean_size(anchors), "document_entries": _mean_size(documents)}


def _mean_size(vectors: Sequence[SparseVector]) -> float:
    return sum(map(len, vectors)) / len(vectors)
