"""Hard negatives: documents that a model ranks high for a query and that do not belong to it.

All documents are scored, a block of them after the other, so that memory grows with the queries and not with the
corpus.

Shapes: Q queries, N documents of a block, K best ones that are kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert.errors import InputError
from modernbert.io.hub import Source
from modernbert.io.tables import Field, ResumableOutput, parse_columns
from modernbert.models.sentence_layout import LATE_INTERACTION, SPARSE_ENCODER, contents_of
from modernbert.pipelines import pipeline
from modernbert.pipelines.late_interaction import scores_of
from modernbert.pipelines.progress import progress_bar
from modernbert.retrieval.sparse import SparseVector, to_csr
from modernbert.training.tasks.contrastive import Contrastive
from modernbert.training.tasks.data import Row, read_tables, rows_of, text_of
from modernbert.training.tasks.distillation import Teacher
from modernbert.training.tasks.options import MineOptions

logger = logging.getLogger(__name__)
_BLOCK = 1024  # documents whose vectors are held
_QUERIES = 256  # queries that are compared with them at a time
_TOGETHER = 64  # rows that the teacher scores at a time
_PAIR = Contrastive.fields[:2]
_CORPUS = Field("text", ("document", "passage", "positive", "context", "answer"))


class Mined(NamedTuple):
    """What was found.

    Attributes:
        rows: of the output.
        negatives: of all of them.
        lacking: rows with fewer than were asked for.
    """

    rows: int
    negatives: int
    lacking: int


def mine(
    pairs: Any = None,
    model: str | Path | None = None,
    output: str | Path | None = None,
    *,
    progress: bool = False,
    say: Callable[[str], None] = logger.info,
    **options: Any,
) -> Mined:
    """Write a table of pairs with hard negatives, which every task of retrieval trains on.

    For each query the documents are ranked by the model. Those that belong to it in any row are never negatives;
    others are left out by the limits, then the best ones by `skip`. A row has "anchor", "positive", "negatives", and
    with a teacher "scores", the logits of the positive and of the negatives. The file appears once it is whole; until
    then its rows are gathered beside it, and the same call goes on after them.

    Args:
        pairs: files of pairs, or rows, as `finetune` takes them.
        model: folder or Hub repository of a sentence encoder, a sparse encoder or a late-interaction encoder.
        output: file to write.
        progress: draw progress on standard error.
        say: takes lines about the work.
        options: such as `negatives=4`; `modernbert mine --help` describes them, as flags.

    Raises:
        InputError: an option is impossible, or the data is unsuitable.
        OSError: a file cannot be read or written.

    Source: limits by the positive's score, arXiv:2407.15831.
    """
    if pairs is None or model is None or output is None:
        name = "pairs" if pairs is None else "model" if model is None else "output"
        raise InputError(f"{name} is not given; mining takes pairs, a model and an output")
    if Path(output).suffix.lower() == ".npy":
        raise InputError(f"output is {output}; rows of texts are written as .jsonl, .csv, .tsv or .parquet")
    corpus = options.pop("corpus", None)
    given = {"pairs": _paths(pairs), "corpus": _paths(corpus), "model": str(model), "output": str(output)}
    wanted = MineOptions.of({**given, **options}, "mine")
    named = parse_columns(wanted.column, [*_PAIR, _CORPUS])
    of_pairs = {name: columns for name, columns in named.items() if name != _CORPUS.name}
    rows, _ = rows_of(read_tables(pairs, None), _PAIR, of_pairs)
    positives = [text_of(row, "positive") for row in rows]
    texts = list(dict.fromkeys(positives))
    if corpus is not None:
        of_corpus = {name: columns for name, columns in named.items() if name == _CORPUS.name}
        found, _ = rows_of(read_tables(corpus, None), (_CORPUS,), of_corpus)
        texts = list(dict.fromkeys(text_of(row, _CORPUS.name) for row in found))
    job = {name: value for name, value in vars(wanted).items() if name not in ("output", "overwrite", "device")}
    with ResumableOutput(Path(output), {"mine": job}, overwrite=wanted.overwrite, flat=True) as table:
        return _written(rows, texts, wanted, table, progress, say)


def _paths(value: Any) -> list[str]:
    """The paths that are given; none if rows are."""
    several = value if isinstance(value, list | tuple) else [value]
    return [str(one) for one in several] if all(isinstance(one, str | Path) for one in several) else []


def _written(
    rows: Sequence[Row],
    texts: list[str],
    options: MineOptions,
    table: ResumableOutput,
    progress: bool,
    say: Callable[[str], None],
) -> Mined:
    """Search, filter, and write the rows that are not written yet."""
    anchors: dict[str, list[str]] = {}
    for row in rows:
        anchors.setdefault(text_of(row, "anchor"), []).append(text_of(row, "positive"))
    say(f"{len(anchors)} queries and {len(texts)} documents")
    best = _search(anchors, texts, options, progress)
    teacher = None if options.teacher is None else Teacher(options.teacher, options.device)
    total, lacking = 0, 0

    def pair_of(row: Row) -> list[str]:
        return [text_of(row, "anchor"), text_of(row, "positive")]

    left = list(table.rest(rows, pair_of))
    groups: Any = (left[i : i + _TOGETHER] for i in range(0, len(left), _TOGETHER))
    if progress and teacher is not None:
        groups = progress_bar(groups, -(-len(left) // _TOGETHER), "teacher")
    for some in groups:
        asked = [pair_of(row) for row in some]
        candidates = [best[anchor] for anchor, _ in asked]
        scores: list[list[float]] | None = None
        if teacher is not None:
            questions = [
                {"query": pair[0], "documents": [pair[1], *found]}
                for pair, found in zip(asked, candidates, strict=True)
            ]
            scores = teacher(questions)
        for i, pair in enumerate(asked):
            kept = list(range(len(candidates[i])))
            if scores is not None and options.teacher_margin is not None:
                limit = scores[i][0] - options.teacher_margin
                kept = [j for j in kept if scores[i][1 + j] <= limit]
            kept = kept[: options.negatives]
            found: dict[str, Any] = {"anchor": pair[0], "positive": pair[1]}
            found["negatives"] = [candidates[i][j] for j in kept]
            if scores is not None:
                found["scores"] = [scores[i][0], *(scores[i][1 + j] for j in kept)]
            table.write({"input": pair, "row": found, "output": {}})
    for record in table.records():
        count = len(record["row"]["negatives"])
        total, lacking = total + count, lacking + (count < options.negatives)
    return Mined(len(rows), total, lacking)


def _search(
    anchors: dict[str, list[str]], texts: list[str], options: MineOptions, progress: bool
) -> dict[str, list[str]]:
    """The best-ranked documents of each query, within the limits, without those that are skipped."""
    ranker = _Ranker(options)
    queries = ranker.encode(list(anchors), True)
    limit_Q = torch.full((len(anchors),), float("inf"))
    if options.margin is not None or options.most_similar is not None:
        limit_Q = _limits(ranker, queries, list(anchors.values()), options)
    wanted = options.negatives if options.teacher is None else options.candidates or 4 * options.negatives
    kept = options.skip + wanted
    best_QK, place_QK = torch.full((len(anchors), kept), float("-inf")), torch.full((len(anchors), kept), -1)
    numbers = {text: number for number, text in enumerate(texts)}
    own = [{numbers[text] for text in (anchor, *right) if text in numbers} for anchor, right in anchors.items()]
    starts: Any = range(0, len(texts), _BLOCK)
    for start in progress_bar(starts, len(starts), "documents") if progress else starts:
        documents = ranker.encode(texts[start : start + _BLOCK], False)
        for first in range(0, len(anchors), _QUERIES):
            some = slice(first, min(first + _QUERIES, len(anchors)))
            scores_QN = ranker.scores(queries[some], documents)
            scores_QN[~(scores_QN <= limit_Q[some, None])] = float("-inf")
            for row, mine_ in enumerate(own[some]):
                inside = [number - start for number in mine_ if start <= number < start + scores_QN.shape[1]]
                scores_QN[row, inside] = float("-inf")
            places_QN = torch.arange(start, start + scores_QN.shape[1]).expand(len(scores_QN), -1)
            all_scores, all_places = torch.cat([best_QK[some], scores_QN], 1), torch.cat([place_QK[some], places_QN], 1)
            best_QK[some], chosen = all_scores.topk(kept, 1)
            place_QK[some] = all_places.gather(1, chosen)
    found = {}
    for anchor, scores, places in zip(anchors, best_QK.tolist(), place_QK.tolist(), strict=True):
        ranked = [texts[place] for score, place in zip(scores, places, strict=True) if score > float("-inf")]
        found[anchor] = ranked[options.skip :]
    return found


def _limits(ranker: _Ranker, queries: Any, positives: list[list[str]], options: MineOptions) -> Tensor:
    """The highest score (Q,) that a negative may have: by the lowest of the query's positives."""
    limits = []
    for first in range(0, len(positives), _QUERIES):
        some = positives[first : first + _QUERIES]
        documents, start = ranker.encode([text for texts in some for text in texts], False), 0
        for query, texts in enumerate(some, first):
            own = documents[start : start + len(texts)]
            lowest, start = float(ranker.scores(queries[query : query + 1], own).min()), start + len(texts)
            by_margin = lowest - (options.margin or 0.0)
            by_share = lowest - abs(lowest) * (1 - (1.0 if options.most_similar is None else options.most_similar))
            limits.append(min(by_margin, by_share))
    return torch.tensor(limits)


class _Ranker:
    """A model that makes vectors of queries and documents, and compares them."""

    def __init__(self, options: MineOptions) -> None:
        kind = contents_of(Source(options.model, options.revision)).kind
        tasks = {LATE_INTERACTION: "late-interaction", SPARSE_ENCODER: "sparse-embedding"}
        self.task = tasks.get(kind, "sentence-embedding")
        self.serve = pipeline(self.task, options.model, revision=options.revision, device=options.device)
        self.similarity = self.serve.model.settings.similarity
        known = ("cosine", "dot") if self.task == "sentence-embedding" else (self.similarity,)
        if self.similarity not in known:
            raise InputError(
                f"{options.model} compares vectors by {self.similarity}; known here are {', '.join(known)}"
            )

    def encode(self, texts: list[str], is_query: bool) -> Any:
        """Something that slices as the texts do."""
        if self.task == "late-interaction":
            return self.serve(texts, is_query=is_query)
        if self.task == "sparse-embedding":
            size, found = self.serve.model.dimensions, self.serve(texts, is_query=is_query)
            return to_csr([SparseVector(**one, dimensions=size) for one in found], size)
        name = "query" if is_query else "document"
        prompt: dict[str, Any] = {"prompt_name": name} if name in self.serve.model.settings.prompts else {}
        vectors = torch.from_numpy(np.asarray(self.serve(texts, truncation=True, **prompt))).float()
        return F.normalize(vectors, dim=-1) if self.similarity == "cosine" else vectors

    def scores(self, queries: Any, documents: Any) -> Tensor:
        """(Q, N) float32."""
        if self.task == "late-interaction":
            return torch.from_numpy(scores_of(self.similarity, queries, documents))
        if self.task == "sparse-embedding":
            return torch.from_numpy((queries @ documents.T).toarray())
        found: Tensor = queries @ documents.T
        return found
