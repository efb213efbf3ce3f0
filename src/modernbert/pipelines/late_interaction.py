"""late-interaction: a vector of every token of a text, compared by MaxSim."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken

from modernbert.checks import check_text
from modernbert.errors import InputError
from modernbert.nn.pooling import unit
from modernbert.pipelines.base import Job, OptionsT, Pipeline, Results, Row, read
from modernbert.pipelines.inputs import choose_prompt
from modernbert.pipelines.options import LateInteractionOptions
from modernbert.retrieval.maxsim import maxsim
from modernbert.retrieval.multi_vector import MultiVectorEncoder

logger = logging.getLogger(__name__)

Vectors = NDArray[np.float32]


@dataclasses.dataclass
class VectorsRow(Row):
    """A query or a document.

    Attributes:
        kept: numbers of the tokens whose vectors count.
        seen: how many first tokens all its tokens see.
    """

    kept: list[int]
    seen: int
    is_query: bool


class VectorsOfTokens(Pipeline[OptionsT, VectorsRow, torch.Tensor]):
    """Base of the tasks that compare vectors of tokens."""

    auto_model = MultiVectorEncoder
    models = (MultiVectorEncoder,)
    needs = "a MultiVectorEncoder"

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        settings = self.model.settings
        vocabulary, unknown = self.tokenizer.get_vocab(), self.tokenizer.unk_token_id
        found = ((word, self.tokenizer.convert_tokens_to_ids(word)) for word in settings.skipped_words)
        self.skipped = {i for word, i in found if i is not None and (i != unknown or word == self.tokenizer.unk_token)}
        for prefix in settings.prefixes:  # single tokens, which the tokenizer must not cut into pieces
            token = next((one for one in (prefix, prefix.split()[0]) if one in vocabulary), None)
            if token is not None and self.tokenizer.tokenize(token) != [token]:
                self.tokenizer.add_tokens([AddedToken(token, normalized=False, special=True)], special_tokens=True)

    @property
    def dimensions(self) -> int:
        """Dimensions of a vector."""
        return int(self.model.width)

    def rows_of(
        self, texts: Sequence[str], is_query: bool, prompt: str, truncation: Any, longest: int | None = None
    ) -> list[VectorsRow]:
        """What the model sees of queries or documents."""
        settings = self.model.settings
        expansion = settings.expansion if is_query else None
        limit = settings.query_length if is_query else settings.document_length
        limit = settings.max_length if limit is None else limit
        if expansion is not None:
            limit = expansion.length if expansion.is_fixed else max(limit or self.context, expansion.length)
        limits = [n for n in (longest, limit) if n is not None]
        how = {"truncation": truncation, "max_length": min(limits) if limits else None}
        encodings = self.tokenize([prompt + text for text in texts], **how)
        skipped = self.skipped if ("query" if is_query else "document") in settings.skipped_in else set()
        rows = []
        for encoding in encodings:
            ids = list(encoding.ids)
            seen = len(ids)
            if expansion is not None:
                ids += [self._added(expansion.token)] * max(0, expansion.length - seen)
            kept = [i for i, token in enumerate(ids) if i >= seen or token not in skipped]
            seen = len(ids) if expansion is None or expansion.attend else seen
            rows.append(VectorsRow(ids, kept, seen, is_query))
        return rows

    def _added(self, token: str | None) -> int:
        """The id that makes queries longer."""
        known = self.tokenizer
        found = known.convert_tokens_to_ids(token) if token is not None else known.mask_token_id or known.eos_token_id
        if found is None or (found == known.unk_token_id and token not in (None, known.unk_token)):
            raise InputError(f"queries are made longer by {token or '[MASK]'}, which the tokenizer has not")
        return int(found)

    def vectors(self, rows: list[VectorsRow], pool_factor: float) -> Results[torch.Tensor]:
        """The vectors that count of each row, float32 on the CPU. Queries and documents have a pass of their own."""
        given = [[row for row in rows if row.is_query], [row for row in rows if not row.is_query]]
        found = [self._vectors(some, pool_factor) for some in given if some]
        if len(found) == 1:
            return found[0]

        def finish() -> list[torch.Tensor]:
            queries, documents = (iter(one() if callable(one) else one) for one in found)
            return [next(queries if row.is_query else documents) for row in rows]

        return finish

    def _vectors(self, rows: list[VectorsRow], pool_factor: float) -> Results[torch.Tensor]:
        """Of queries alone, or of documents alone."""
        are_queries = rows[0].is_query
        seen = [row.seen for row in rows] if self._is_partly_seen(rows[0]) else None
        vectors_TD = self.model.token_vectors(self.pack(rows), seen)

        def finish(vectors_TD: torch.Tensor) -> list[torch.Tensor]:
            parts = vectors_TD.split([len(row.ids) for row in rows])
            kept = [part[row.kept] for part, row in zip(parts, rows, strict=True)]
            return kept if are_queries or pool_factor <= 1 else [self._pooled(part, pool_factor) for part in kept]

        return read(vectors_TD.float(), finish)

    def reads_states(self, row: VectorsRow, options: OptionsT) -> bool:
        """Queries whose tokens do not see what was added have a pass with a mask of their own."""
        return not self._is_partly_seen(row)

    def _is_partly_seen(self, row: VectorsRow) -> bool:
        expansion = self.model.settings.expansion
        return row.is_query and expansion is not None and not expansion.attend

    def _pooled(self, vectors_TD: torch.Tensor, factor: float) -> torch.Tensor:
        """Vectors of similar tokens averaged, by Ward's clustering of their cosine distances."""
        settings = self.model.settings
        kept, rest = vectors_TD[: settings.protected_tokens], vectors_TD[settings.protected_tokens :]
        clusters = max(int(len(rest) // factor), 1)
        if clusters < len(rest):
            rest = _clustered(rest, clusters)
        vectors_TD = torch.cat([kept, rest])
        return unit(vectors_TD) if settings.pool_normalizes else vectors_TD

    def prompt(self, is_query: bool, name: str | None = None, given: str | None = None) -> str:
        """The text before each text: what is given, or one of the checkpoint's prompts."""
        settings = self.model.settings
        usual = ("query" if is_query else "document", settings.default_prompt_name)
        return choose_prompt(settings.prompts, usual, name, given)


class LateInteractionPipeline(VectorsOfTokens[LateInteractionOptions]):
    """Vectors of tokens, compared by `modernbert.maxsim`.

    A call takes a text, a list of texts or an iterable of them; `is_query=True` encodes them as queries, which some
    checkpoints make longer by [MASK]. For each text it gives a float32 array (tokens, dimensions), each of length one.
    """

    task = "late-interaction"
    options = LateInteractionOptions

    def resolve(self, options: LateInteractionOptions) -> LateInteractionOptions:
        """Options with the checkpoint's prompt and pooling; texts are cut."""
        settings = self.model.settings
        prompt = self.prompt(options.is_query, options.prompt_name, options.prompt)
        factor = settings.pool_factor if options.pool_factor is None else options.pool_factor
        cut = True if options.truncation is None else options.truncation
        return dataclasses.replace(options, prompt=prompt, prompt_name=None, pool_factor=factor, truncation=cut)

    def prepare(self, items: list[Any], options: LateInteractionOptions) -> list[list[VectorsRow]]:
        for text in items:
            check_text(text)
        assert options.prompt is not None
        rows = self.rows_of(items, options.is_query, options.prompt, options.truncation, options.max_length)
        return [[row] for row in rows]

    def run(self, rows: list[VectorsRow], options: LateInteractionOptions) -> Results[torch.Tensor]:
        """Vectors (tokens, dimensions) of each row."""
        return self.vectors(rows, options.pool_factor or 1)

    def finish(self, job: Job[VectorsRow, torch.Tensor], options: LateInteractionOptions) -> Vectors:
        vectors: Vectors = job.results[0].numpy()
        return vectors.copy()

    def similarity(self, queries: Sequence[Vectors], documents: Sequence[Vectors]) -> Vectors:
        """Scores (queries, documents) of what the pipeline gave, by the checkpoint's similarity."""
        return scores_of(self.model.settings.similarity, queries, documents)


def scores_of(similarity: str, queries: Sequence[Any], documents: Sequence[Any]) -> Vectors:
    """MaxSim of several queries and documents, (Q, B); "meanmaxsim" divides by the number of a query's vectors."""
    scores = np.atleast_2d(maxsim(list(queries), list(documents)))
    if similarity == "meanmaxsim":
        scores = scores / np.array([len(query) for query in queries], np.float32)[:, None]
    return scores


def _clustered(vectors_TD: torch.Tensor, clusters: int) -> torch.Tensor:
    """The mean of each cluster of vectors, in the order of the clusters."""
    try:
        from scipy.cluster import hierarchy
        from scipy.spatial.distance import squareform
    except ImportError as error:
        raise InputError("pool_factor needs scipy: pip install scipy") from error
    distances = (1 - vectors_TD @ vectors_TD.T).clamp(0, 2).numpy()
    linkage = hierarchy.linkage(squareform(distances, checks=False), method="ward")
    labels = hierarchy.fcluster(linkage, t=clusters, criterion="maxclust").astype(np.int64)
    _, inverse = np.unique(labels, return_inverse=True)
    sums = torch.zeros(int(inverse.max()) + 1, vectors_TD.shape[1]).index_add_(0, torch.from_numpy(inverse), vectors_TD)
    return sums / torch.from_numpy(np.bincount(inverse)).unsqueeze(1)
