"""Vectors of texts that belong together, told apart from all others of their batch.

Shapes: B pairs of a step, R rows of a forward pass, N candidates, D dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernbert.errors import InputError
from modernbert.io.tables.columns import Field
from modernbert.models.formats import refuse_to_train
from modernbert.models.sentence_encoder import SentenceEncoder
from modernbert.nn.losses import cross_entropy
from modernbert.training.contract import Batch, Evaluation, Pass
from modernbert.training.examples import Example
from modernbert.training.tasks.base import Task, texts_in, worst
from modernbert.training.tasks.data import Row, text_of
from modernbert.training.tasks.metrics import retrieval_metrics
from modernbert.training.tasks.options import FinetuneOptions


class SentenceEmbedding(Task):
    """Anchors find their positives among those of all pairs of the step, and the negatives.

    The loss is the cross-entropy of cosine similarities over a temperature; candidates that read the same as the right
    one do not count as wrong. A step that is larger than a forward pass is computed twice: once for the vectors, and
    once more, part by part, with the gradients of the loss by them, so that memory does not limit the number of
    candidates.

    Rows hold an anchor, a positive and perhaps negatives.

    Source: in-batch negatives, arXiv:1705.00652; gradient caching, arXiv:2101.06983; Matryoshka dimensions,
    arXiv:2205.13147.
    """

    name = "sentence-embedding"
    auto_model = SentenceEncoder
    fields = (
        Field("anchor", ("query", "question", "sentence1", "sentence_1", "premise", "title", "text")),
        Field("positive", ("document", "passage", "answer", "context", "sentence2", "sentence_2", "pos", "hypothesis")),
        Field("negatives", ("negative", "neg", "hard_negatives"), required=False, many=True),
    )
    metric = "recall_at_1"

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        given = {"query": options.query_prompt, "document": options.document_prompt}
        self.prompts = {name: prompt for name, prompt in given.items() if prompt}

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

    def prepare(self, rows: Sequence[Row], training: bool) -> list[Example]:
        """Each of an anchor, its positive and its negatives; labels are numbers of these among all documents."""
        anchors = [text_of(row, "anchor") for row in rows]
        documents = [[text_of(row, "positive"), *texts_in(row, "negatives")] for row in rows]
        numbers: dict[str, int] = {}
        for text in (text for texts in documents for text in texts):
            numbers.setdefault(text, len(numbers))
        anchor_encodings = self.encode([self.prompts.get("query", "") + text for text in anchors])
        document_encodings = self.encode([self.prompts.get("document", "") + text for text in numbers])
        document_ids = [encoding.ids for encoding in document_encodings]
        examples = []
        for anchor, encoding, texts in zip(anchors, anchor_encodings, documents, strict=True):
            label = [numbers[text] for text in texts]
            ids = [encoding.ids, *(document_ids[number] for number in label)]
            examples.append(Example(ids, label, {"anchor": anchor, "positive": texts[0]}))
        return examples

    def labels(self, examples: Sequence[Example]) -> Batch:
        """(R,) numbers of the documents that the rows are, -1 for anchors."""
        return {"documents": torch.tensor([n for example in examples for n in (-1, *example.label)])}

    def count(self, batch: Batch) -> float:
        return float((batch["documents"] < 0).sum())

    def losses(self, model: nn.Module, batches: Sequence[Batch], total: float, one_pass: Pass) -> Tensor:
        """In one pass, or with cached gradients of the vectors."""
        documents = torch.cat([batch["documents"] for batch in batches])
        if len(batches) == 1:
            with one_pass(True) as backward:
                loss = self.contrast(_vectors(model, batches[0]), documents, total)
                backward(loss)
            return loss.detach()
        first = torch.initial_seed()

        def vectors_of(number: int) -> Tensor:
            torch.manual_seed((first + number) % 2**63)  # the same dropout both times
            return _vectors(model, batches[number])

        with torch.no_grad():
            parts = [vectors_of(i) for i in range(len(batches))]
        leaf = torch.cat(parts).detach().requires_grad_()
        loss = self.contrast(leaf, documents, total)
        (gradient,) = torch.autograd.grad(loss, leaf)
        for i, part in enumerate(gradient.split([len(p) for p in parts])):
            with one_pass(i == len(batches) - 1) as backward:
                backward((vectors_of(i).float() * part).sum())
        return loss.detach()

    def contrast(self, vectors_RD: Tensor, documents_R: Tensor, total: float) -> Tensor:
        """The loss of rows that are anchors (-1 in `documents_R`), each followed by its positive and its negatives."""
        is_anchor = documents_R < 0
        is_positive = is_anchor.roll(1)
        numbers_N = documents_R[~is_anchor]
        right_B = is_positive[~is_anchor].nonzero().squeeze(1)
        same_BN = numbers_N[right_B, None] == numbers_N[None]
        same_BN[torch.arange(len(right_B), device=same_BN.device), right_B] = False
        loss = vectors_RD.new_zeros((), dtype=torch.float32)
        with torch.autocast(vectors_RD.device.type, enabled=False):
            for width in (*self.options.matryoshka, vectors_RD.shape[1]):
                unit_RD = F.normalize(vectors_RD[:, :width].float(), dim=-1)
                scores_BN = unit_RD[is_anchor] @ unit_RD[~is_anchor].mT / self.options.temperature
                scores_BN = scores_BN.masked_fill(same_BN, float("-inf"))
                loss = loss + cross_entropy(scores_BN, right_B, num_items=total)
        return loss

    def answers(self, output: Any) -> Tensor:
        vectors: Tensor = output
        return vectors.float()

    def evaluate_on(self, model: Any, examples: Sequence[Example]) -> Evaluation:
        """Recall of each anchor's positive among all documents of the evaluation."""
        ids = {n: row for example in examples for n, row in zip(example.label, example.rows[1:], strict=True)}
        places = {number: place for place, number in enumerate(ids)}
        right_B = torch.tensor([places[example.label[0]] for example in examples])
        positives = {places[example.label[0]]: example.record["positive"] for example in examples}
        anchors_BD, documents_ND = (
            torch.cat(self.outputs(model, [Example([row]) for row in rows]))
            for rows in ([example.rows[0] for example in examples], ids.values())
        )
        metrics: dict[str, float] = {}
        for width in (*self.options.matryoshka, anchors_BD.shape[1]):
            unit_BD, unit_ND = (F.normalize(x[:, :width], dim=-1) for x in (anchors_BD, documents_ND))
            ranks, best, margins = [], [], []
            for part_BD, part_B in zip(unit_BD.split(1024), right_B.split(1024), strict=True):
                scores_BN = part_BD @ unit_ND.mT
                own_B = scores_BN.gather(1, part_B[:, None])
                ranks += (~(scores_BN < own_B)).sum(1).tolist()  # itself, what ties with it, what is no number
                top_B, first_B = scores_BN.max(1)
                best += first_B.tolist()
                margins += (top_B - own_B[:, 0]).tolist()
            suffix = "" if width == anchors_BD.shape[1] else f"_{width}"
            metrics |= {f"{name}{suffix}": value for name, value in retrieval_metrics(ranks).items()}
        wrong, predictions = [], []
        for example, rank, first, margin in zip(examples, ranks, best, margins, strict=True):
            predictions.append({**example.record, "rank": rank})
            if rank > 1:
                found = positives.get(first, "(a negative)")
                wrong.append((margin, {**example.record, "found": found, "rank": rank}))
        metrics["documents"] = float(len(ids))
        return Evaluation(metrics, errors=worst(wrong), predictions=predictions)


def _vectors(model: nn.Module, batch: Batch) -> Tensor:
    vectors: Tensor = model(input_ids=batch["input_ids"], cu_seqlens=batch["cu_seqlens"])
    return vectors
