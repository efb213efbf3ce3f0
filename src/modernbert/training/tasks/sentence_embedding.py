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
from modernbert.training.tasks.base import Task, shown, worst
from modernbert.training.tasks.data import Row, text_of
from modernbert.training.tasks.metrics import retrieval_figures
from modernbert.training.tasks.options import FinetuneOptions


class SentenceEmbedding(Task):
    """Anchors find their positives among those of all pairs of the step, and the negatives.

    The loss is the cross-entropy of cosine similarities over a temperature; candidates that read the same as the right
    one do not count as wrong. A step that is larger than a forward pass is computed twice: once for the vectors, and
    once more, part by part, with the gradients of the loss by them, so that the number of candidates is no matter of
    memory.

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
        """An encoder of sentences; a bare encoder gets a pooling."""
        model = SentenceEncoder.from_pretrained(
            name, dtype=torch.float32, revision=options.revision, attn_implementation=options.attn_implementation
        )
        refuse_to_train(model.config, str(name))
        settings = model.settings
        self.prompts = {**settings.prompts, **self.prompts}
        if not model.is_layout:
            settings = dataclasses.replace(settings, poolings=(self.options.pooling,))
        model.settings = dataclasses.replace(settings, prompts=self.prompts)
        wide = [d for d in self.options.matryoshka if not 0 < d < model.dimensions]
        if wide:
            raise InputError(f"matryoshka is {wide[0]}; vectors have {model.dimensions} dimensions, take fewer")
        return model

    def prepare(self, rows: Sequence[Row], training: bool) -> list[Example]:
        """Each with the rows of its anchor, its positive and its negatives; the label is what these read."""
        before, behind = self.prompts.get("query", ""), self.prompts.get("document", "")
        anchors = [text_of(row, "anchor") for row in rows]
        documents = []
        for row in rows:
            negatives = row.values.get("negatives") or []
            if not all(isinstance(text, str) and text.strip() for text in negatives):
                raise InputError(f"{row.where} has the negatives {negatives!r}; texts are wanted")
            documents.append([text_of(row, "positive"), *negatives])
        unique = list(dict.fromkeys(text for texts in documents for text in texts))
        numbers = {text: i for i, text in enumerate(unique)}
        anchor_ids = self.encode([before + text for text in anchors])
        document_ids = self.encode([behind + text for text in unique])
        return [
            Example(
                [ids, *(document_ids[numbers[text]] for text in texts)],
                [numbers[text] for text in texts],
                {"anchor": anchor, "positive": texts[0]},
            )
            for anchor, ids, texts in zip(anchors, anchor_ids, documents, strict=True)
        ]

    def labels(self, examples: Sequence[Example]) -> Batch:
        """Which documents the rows are, -1 for anchors."""
        return {"documents": torch.tensor([n for example in examples for n in (-1, *example.label)])}

    def count(self, batch: Batch) -> float:
        """Pairs of a batch."""
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

    def judge(self, model: Any, examples: Sequence[Example]) -> Evaluation:
        """Recall of each anchor's positive among all documents of the evaluation."""
        rows = {n: row for example in examples for n, row in zip(example.label, example.rows[1:], strict=True)}
        texts = {example.label[0]: example.record["positive"] for example in examples}
        order = list(rows)
        place = {n: i for i, n in enumerate(order)}
        anchors_BD = self._encode(model, [example.rows[0] for example in examples])
        documents_ND = self._encode(model, [rows[n] for n in order])
        right = torch.tensor([place[example.label[0]] for example in examples])
        figures: dict[str, float] = {}
        for width in (*self.options.matryoshka, anchors_BD.shape[1]):
            left_BD, unit_ND = (F.normalize(x[:, :width], dim=-1) for x in (anchors_BD, documents_ND))
            ranks, best, margins = [], [], []
            for part_BD, part_right in zip(left_BD.split(1024), right.split(1024), strict=True):
                scores_BN = part_BD @ unit_ND.mT
                own_B = scores_BN.gather(1, part_right[:, None])
                ranks += (~(scores_BN < own_B)).sum(1).tolist()  # itself, what ties with it, what is no number
                top_B, first_B = scores_BN.max(1)
                best += first_B.tolist()
                margins += (top_B - own_B[:, 0]).tolist()
            figures |= {
                name if width == anchors_BD.shape[1] else f"{name}_{width}": value
                for name, value in retrieval_figures(ranks).items()
            }
        wrong, predictions = [], []
        for example, rank, first, margin in zip(examples, ranks, best, margins, strict=True):
            record = example.record
            predictions.append({**record, "rank": rank})
            if rank > 1:
                found = texts.get(order[first], "(a negative)")
                row = {"anchor": shown(record["anchor"]), "positive": shown(record["positive"])}
                wrong.append((margin, {**row, "found": shown(found), "rank": rank}))
        figures["documents"] = float(len(order))
        return Evaluation(figures, errors=worst(wrong), predictions=predictions)

    def _encode(self, model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
        out: Tensor | None = None
        for chosen, vectors in self.outputs(model, [Example([row]) for row in rows]):
            out = vectors.new_empty((len(rows), vectors.shape[1]), dtype=torch.float32) if out is None else out
            out[chosen] = vectors.float()
        assert out is not None
        return out.cpu()


def _vectors(model: nn.Module, batch: Batch) -> Tensor:
    vectors: Tensor = model(input_ids=batch["input_ids"], cu_seqlens=batch["cu_seqlens"])
    return vectors
