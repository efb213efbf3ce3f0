"""What the tasks share whose vectors of texts that belong together are told apart from all others of their batch.

Shapes: B pairs of a step, R rows of a forward pass, N candidates.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modernbert.io.tables.columns import Field
from modernbert.nn.losses import cross_entropy
from modernbert.training.contract import Batch, Evaluation, Pass
from modernbert.training.examples import Example
from modernbert.training.tasks.base import Task, texts_in, worst
from modernbert.training.tasks.data import Row, text_of
from modernbert.training.tasks.distillation import SCORES, check_scores, distilled
from modernbert.training.tasks.metrics import retrieval_metrics


class Contrastive(Task):
    """Anchors find their positives among those of all pairs of the step, and the negatives.

    The loss is the cross-entropy of similarities over a temperature; candidates that read the same as the right one do
    not count as wrong. Or it is that of a teacher's scores of the row's own documents. A step that is larger than a
    forward pass is computed twice: once for the vectors, and once more, part by part, with the gradients of the loss by
    them, so that memory does not limit the number of candidates.

    Rows hold an anchor, a positive and perhaps negatives, and a teacher's scores of these.

    Source: in-batch negatives, arXiv:1705.00652; gradient caching, arXiv:2101.06983.
    """

    fields = (
        Field("anchor", ("query", "question", "sentence1", "sentence_1", "premise", "title", "text")),
        Field("positive", ("document", "passage", "answer", "context", "sentence2", "sentence_2", "pos", "hypothesis")),
        Field("negatives", ("negative", "neg", "hard_negatives"), required=False, many=True),
        SCORES,
    )
    ranked = ("anchor", "positive")
    metric = "recall_at_1"

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        given = {"query": options.query_prompt, "document": options.document_prompt}
        self.prompts = {name: prompt for name, prompt in given.items() if prompt}

    @property
    def temperature(self) -> float:
        """What similarities are divided by."""
        return float(self.options.temperature)

    def rows_of(self, texts: Sequence[str], is_query: bool) -> list[Any]:
        """The ids of anchors, or of documents."""
        prompt = self.prompts.get("query" if is_query else "document", "")
        return [encoding.ids for encoding in self.encode([prompt + text for text in texts])]

    def prepare(self, rows: Sequence[Row], training: bool) -> list[Example]:
        """Each of an anchor, its positive and its negatives; labels are numbers of these among all documents."""
        anchors = [text_of(row, "anchor") for row in rows]
        documents = [[text_of(row, "positive"), *texts_in(row, "negatives")] for row in rows]
        numbers: dict[str, int] = {}
        for text in (text for texts in documents for text in texts):
            numbers.setdefault(text, len(numbers))
        anchor_ids, document_ids = self.rows_of(anchors, True), self.rows_of(list(numbers), False)
        examples = []
        for row, anchor, ids, texts in zip(rows, anchors, anchor_ids, documents, strict=True):
            label = [numbers[text] for text in texts]
            record: dict[str, Any] = {"anchor": anchor, "positive": texts[0]}
            if training and self.options.is_distilled:
                record["scores"] = check_scores(row, len(texts))
            examples.append(Example([ids, *(document_ids[number] for number in label)], label, record))
        return examples

    def labels(self, examples: Sequence[Example]) -> Batch:
        """(R,) numbers of the documents that the rows are, -1 for anchors; and the teacher's scores of them."""
        batch: Batch = {"documents": torch.tensor([n for example in examples for n in (-1, *example.label)])}
        if self.options.is_distilled:
            batch["scores"] = torch.tensor([n for example in examples for n in (0.0, *example.record["scores"])])
        return batch

    def count(self, batch: Batch) -> float:
        return float((batch["documents"] < 0).sum())

    # Vectors and their similarities

    def vectors(self, model: nn.Module, batch: Batch) -> Tensor:
        """What a forward pass makes of a batch, and what `similarities` compares."""
        vectors: Tensor = model(input_ids=batch["input_ids"], cu_seqlens=batch["cu_seqlens"])
        return vectors

    @abc.abstractmethod
    def similarities(self, vectors: Tensor, is_anchor_R: Tensor, step: Batch) -> list[Tensor]:
        """Similarities (B, N) of anchors and documents, float32; several if each of them is trained.

        Args:
            vectors: of all rows of a step, as `vectors` gave them.
            is_anchor_R: which rows are anchors.
            step: what the batches of the step hold besides ids, put together.
        """

    def penalty(self, vectors: Tensor, is_anchor_R: Tensor) -> Tensor | float:
        """What is added to the loss of a step."""
        return 0.0

    def losses(self, model: nn.Module, batches: Sequence[Batch], total: float, one_pass: Pass) -> Tensor:
        """In one pass, or with cached gradients of the vectors."""
        step = {n: torch.cat([b[n] for b in batches]) for n in batches[0] if n not in ("input_ids", "cu_seqlens")}
        step["lengths"] = torch.cat([batch["cu_seqlens"].diff() for batch in batches])
        if len(batches) == 1:
            with one_pass(True) as backward:
                loss = self.contrast(self.vectors(model, batches[0]), step, total)
                backward(loss)
            return loss.detach()
        first = torch.initial_seed()

        def vectors_of(number: int) -> Tensor:
            torch.manual_seed((first + number) % 2**63)  # the same dropout both times
            return self.vectors(model, batches[number])

        with torch.no_grad():
            parts = [vectors_of(i) for i in range(len(batches))]
        leaf = torch.cat(parts).detach().requires_grad_()
        loss = self.contrast(leaf, step, total)
        (gradient,) = torch.autograd.grad(loss, leaf)
        for i, part in enumerate(gradient.split([len(p) for p in parts])):
            with one_pass(i == len(batches) - 1) as backward:
                backward((vectors_of(i).float() * part).sum())
        return loss.detach()

    def contrast(self, vectors: Tensor, step: Batch, total: float) -> Tensor:
        """The loss of rows that are anchors (-1 in "documents"), each followed by its positive and its negatives."""
        is_anchor_R = step["documents"] < 0
        is_positive_R = is_anchor_R.roll(1)
        numbers_N = step["documents"][~is_anchor_R]
        right_B = is_positive_R[~is_anchor_R].nonzero().squeeze(1)
        same_BN = numbers_N[right_B, None] == numbers_N[None]
        same_BN[torch.arange(len(right_B), device=same_BN.device), right_B] = False
        loss = vectors.new_zeros((), dtype=torch.float32)
        with torch.autocast(vectors.device.type, enabled=False):
            for similarity_BN in self.similarities(vectors, is_anchor_R, step):
                scores_BN = similarity_BN / self.temperature
                if self.options.is_distilled:
                    starts = right_B.tolist()
                    own = [slice(a, b) for a, b in zip(starts, [*starts[1:], len(numbers_N)], strict=True)]
                    student = [scores_N[some] for scores_N, some in zip(scores_BN, own, strict=True)]
                    teacher_N = step["scores"][~is_anchor_R]
                    loss = loss + distilled(self.options.loss, student, [teacher_N[some] for some in own], total)
                else:
                    scores_BN = scores_BN.masked_fill(same_BN, float("-inf"))
                    loss = loss + cross_entropy(scores_BN, right_B, num_items=total)
            # A process that has so many of the step's anchors has that share of the penalty.
            return loss + self.penalty(vectors, is_anchor_R) * (len(right_B) / total)

    # Evaluation

    def answers(self, output: Any) -> Tensor:
        vectors: Tensor = output
        return vectors.float()

    @abc.abstractmethod
    def compared(self, anchors: list[Any], documents: list[Any]) -> Iterator[tuple[str, Iterator[Tensor]]]:
        """Similarities (anchors, documents), some anchors after the other, of what `outputs` kept of each.

        Yields:
            What the names of the metrics end with, and the similarities.
        """

    def more_metrics(self, anchors: list[Any], documents: list[Any]) -> dict[str, float]:
        """Metrics of the vectors themselves."""
        return {}

    def evaluate_on(self, model: Any, examples: Sequence[Example]) -> Evaluation:
        """Recall of each anchor's positive among all documents of the evaluation."""
        ids = {n: row for example in examples for n, row in zip(example.label, example.rows[1:], strict=True)}
        places = {number: place for place, number in enumerate(ids)}
        right = torch.tensor([places[example.label[0]] for example in examples])
        positives = {places[example.label[0]]: example.record["positive"] for example in examples}
        anchors, documents = (
            self.outputs(model, [Example([row]) for row in rows])
            for rows in ([example.rows[0] for example in examples], ids.values())
        )
        metrics: dict[str, float] = {}
        for suffix, parts in self.compared(anchors, documents):
            ranks: list[int] = []
            best: list[int] = []
            margins: list[float] = []
            for scores_BN in parts:
                own_B = scores_BN.gather(1, right[len(ranks) : len(ranks) + len(scores_BN), None])
                ranks += (~(scores_BN < own_B)).sum(1).tolist()  # itself, what ties with it, what is no number
                top_B, first_B = scores_BN.max(1)
                best += first_B.tolist()
                margins += (top_B - own_B[:, 0]).tolist()
            metrics |= {f"{name}{suffix}": value for name, value in retrieval_metrics(ranks).items()}
        wrong, predictions = [], []
        for example, rank, first, margin in zip(examples, ranks, best, margins, strict=True):
            predictions.append({**example.record, "rank": rank})
            if rank > 1:
                found = positives.get(first, "(a negative)")
                wrong.append((margin, {**example.record, "found": found, "rank": rank}))
        metrics["documents"] = float(len(ids))
        metrics |= self.more_metrics(anchors, documents)
        return Evaluation(metrics, errors=worst(wrong), predictions=predictions)
