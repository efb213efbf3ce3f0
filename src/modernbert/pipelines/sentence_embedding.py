"""sentence-embedding: a vector of a text, of parts of it, or of each of its tokens."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Encoding

from modernbert.auto import TRAINED_HEADS, AutoConfig, kind_of
from modernbert.checks import check_text, check_value, kinds_of
from modernbert.config import ModernBertConfig
from modernbert.errors import CheckpointError, InputError, shown
from modernbert.io.hub import Source
from modernbert.models.encoder import ModernBertModel
from modernbert.models.placement import resolve_device
from modernbert.models.sentence_encoder import SentenceEncoder
from modernbert.models.sentence_layout import MODEL, EmbeddingSettings, contents_of
from modernbert.nn.packing import Packing
from modernbert.nn.pooling import unit
from modernbert.pipelines.base import Job, OptionsT, Pipeline, Results, Row, read
from modernbert.pipelines.inputs import check_fields, check_iterable, choose_prompt
from modernbert.pipelines.options import BatchOptions, SentenceEmbeddingOptions

logger = logging.getLogger(__name__)

Vectors = NDArray[np.float32]


@dataclasses.dataclass
class SpannedRow(Row):
    """A text and the spans of its tokens that have a vector each; parts are spans that the caller chose."""

    spans: list[tuple[int, int]]
    are_parts: bool = False


@dataclasses.dataclass(frozen=True)
class VectorKind:
    """Which vectors are wanted.

    Attributes:
        poolings: modes of `nn.pooling`; several are put one after another. Empty for a vector of every token.
        normalize: whether they have length one.
        truncate_dim: how many of the first dimensions are kept; None keeps all.
    """

    poolings: tuple[str, ...]
    normalize: bool
    truncate_dim: int | None = None


class EmbeddingPipeline(Pipeline[OptionsT, SpannedRow, torch.Tensor]):
    """Base of the tasks that compare vectors: texts with prompts in, vectors out."""

    auto_model = SentenceEncoder
    models = (SentenceEncoder,)
    needs = "an encoder without a head, or a SentenceEncoder"

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        super().__init__(SentenceEncoder(model) if isinstance(model, ModernBertModel) else model, tokenizer, **options)

    @classmethod
    def load(cls, model: Any, tokenizer: Any = None, **kwargs: Any) -> Self:
        """Like `Pipeline.load`.

        Raises:
            CheckpointError: the folder holds a cross-encoder, which has no vectors.
        """
        if isinstance(model, str | Path):
            source = Source.pop_from(model, dict(kwargs))
            contents = contents_of(source)
            contents.refuse_cross_encoder()
            if contents.kind == MODEL:
                _check_head(model, source)
        pipeline = super().load(model, tokenizer, **kwargs)
        if isinstance(model, str | Path) and not pipeline.model.is_layout:
            logger.info(
                "%s has no settings for vectors, so they are means of its states, good only if trained to be compared",
                model,
            )
        return pipeline

    @property
    def embedding(self) -> EmbeddingSettings:
        """What the checkpoint says about its vectors."""
        settings: EmbeddingSettings = self.model.settings
        return settings

    @property
    def dimensions(self) -> int:
        """Dimensions of a vector."""
        return int(self.model.dimensions)

    @property
    def context(self) -> int:
        """Tokens of a text at the most: what the checkpoint's layout says, or the model's context."""
        context = super().context
        return min(context, self.embedding.max_length or context)

    def prompt(self, name: str | None, given: str | None = None) -> str:
        """The text that goes before a text: one of the checkpoint's prompts (by default its own), or what is given."""
        return choose_prompt(self.embedding.prompts, [self.embedding.default_prompt_name], name, given)

    def skipped(self, prompt: str) -> int:
        """Tokens at the beginning of a text that are not pooled."""
        if not prompt or self.embedding.include_prompt:
            return 0
        ids = self.tokenizer(prompt).input_ids
        return len(ids) - bool(ids and ids[-1] in (self.tokenizer.sep_token_id, self.tokenizer.eos_token_id))

    def vectors(self, rows: list[SpannedRow], kind: VectorKind) -> Results[torch.Tensor]:
        """Vectors of each row, float32 on the CPU: of its tokens, or of its spans."""
        inputs = self.pack(rows)
        vectors = self.model.token_vectors(inputs)
        counts = [len(row.spans if kind.poolings else row.ids) for row in rows]
        if kind.poolings:
            vectors = self._pooled(vectors, rows, inputs.packing, kind.poolings)
        vectors = vectors.float()
        width = kind.truncate_dim or self.embedding.truncate_dim
        if width is not None:
            vectors = vectors[:, :width]
        vectors = unit(vectors) if kind.normalize else vectors
        return read(vectors, lambda vectors: vectors.split(counts))

    def _pooled(
        self, states_TM: torch.Tensor, rows: list[SpannedRow], packing: Packing, poolings: tuple[str, ...]
    ) -> torch.Tensor:
        """A vector of each span. Parts of a text have no token that stands for them, so they are pooled by the mean."""
        firsts = packing.starts[:-1]
        spans = [(first + a, first + b) for first, row in zip(firsts, rows, strict=True) for a, b in row.spans]
        vectors = self.model.pool(states_TM, spans, packing.positions_T, poolings)
        of_parts = tuple("mean" if mode in ("cls", "last") else mode for mode in poolings)
        if of_parts == poolings or not any(row.are_parts for row in rows):
            return vectors
        parts = torch.tensor([row.are_parts for row in rows for _ in row.spans], device=vectors.device)
        return torch.where(parts[:, None], self.model.pool(states_TM, spans, packing.positions_T, of_parts), vectors)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedOptions(SentenceEmbeddingOptions):
    """Options with what the checkpoint says of prompts and vectors."""

    prompt: str
    kind: VectorKind


class SentenceEmbeddingPipeline(EmbeddingPipeline[ResolvedOptions]):
    """Vectors of texts.

    Checkpoints in sentence-transformers' layout give that library's numbers; a bare encoder uses mean pooling.

    A call takes a text, a dict {"text", "spans"}, a list of these or an iterable of them. With `spans`, pairs of
    characters [start, end) of the text, the whole text is read in one pass and each span gets a vector of its own
    tokens (late chunking), by the mean where the checkpoint takes a single token.

    For each text it gives a float32 array (dimensions,), or (spans, dimensions), or (tokens, dimensions). A list of
    texts gives one array (texts, dimensions); with spans or tokens, a list of arrays.
    """

    task = "sentence-embedding"
    options = SentenceEmbeddingOptions

    def encode(
        self,
        sentences: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str | None = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        normalize_embeddings: bool | None = None,
        **options: Any,
    ) -> Any:
        """Vectors of a text or of texts, with the arguments of sentence-transformers' `encode`.

        Args:
            sentences: a text, or texts in a list, an array, a column of a data frame or any other iterable; all of them
                are read before the first is answered. None at all are allowed.
            batch_size: has no effect; the pipeline's `batch_tokens` says how much is computed together.
            show_progress_bar, normalize_embeddings: `progress` and `normalize` of a call.
            output_value, precision: "sentence_embedding" (see `multi_vector` for vectors of tokens) and "float32".
            convert_to_numpy: give arrays; False gives a tensor for a text, and a list of tensors for several.
            convert_to_tensor: give one tensor, on the model's device, whatever `convert_to_numpy` says.
            device: where the model is; it is not moved.
            prompt_name, prompt, options: as in a call.

        Returns:
            For a text (dimensions,), for several (texts, dimensions), float32; with spans or tokens, as in a call.

        Raises:
            InputError: a text or an option cannot be served.
        """
        known = {**inspect.signature(self.encode).parameters, **kinds_of(self.options), "progress": 0, "on_error": 0}
        if unknown := sorted(set(options) - set(known)):
            raise InputError(f"encode has no option {', '.join(unknown)}; there are {', '.join(known)}")
        BatchOptions(batch_size=batch_size)
        if output_value not in (None, "sentence_embedding"):
            raise InputError(
                f"output_value is {shown(output_value)}; choose 'sentence_embedding', or multi_vector=True for tokens"
            )
        if precision not in (None, "float32"):
            raise InputError(f"precision is {shown(precision)}; choose float32")
        self._check_device(device)
        as_one = check_value("convert_to_tensor", convert_to_tensor or False, bool, {})
        as_arrays = check_value("convert_to_numpy", True if convert_to_numpy is None else convert_to_numpy, bool, {})
        given = {"prompt_name": prompt_name, "prompt": prompt, "normalize": normalize_embeddings}
        given |= {"progress": show_progress_bar}
        options |= {name: value for name, value in given.items() if value is not None}
        if isinstance(sentences, np.ndarray):
            sentences = sentences.tolist()
        alone = isinstance(sentences, str | dict)
        if not alone:
            sentences = list(check_iterable("sentences", sentences))
        # No texts: one of nothing in particular checks the options and tells the dimensions.
        answers = self(sentences, **options) if sentences else self(["a"], **{**options, "progress": False})[:0]
        if as_arrays and not as_one:
            return answers
        if isinstance(answers, np.ndarray):
            tensor = torch.from_numpy(answers).to(self.model.device)
            return tensor if as_one or tensor.ndim == 1 or alone else list(tensor)
        return [torch.from_numpy(a).to(self.model.device) if isinstance(a, np.ndarray) else a for a in answers]

    def _check_device(self, device: Any) -> None:
        """Refuse a device that is not the model's."""
        if device is None:
            return
        here = self.model.device
        wanted = None if isinstance(device, list | tuple) else resolve_device(device)
        if wanted is None or wanted.type != here.type or wanted.index not in (None, here.index):
            raise InputError(f"device is {shown(device)}, and the model is on {here}; choose it in pipeline(device=)")

    def gather(self, answers: list[Any]) -> Any:
        """One array of vectors, where each text has one."""
        if all(isinstance(a, np.ndarray) and a.ndim == 1 for a in answers):
            return np.stack(answers)
        return answers

    def resolve(self, options: SentenceEmbeddingOptions) -> ResolvedOptions:
        """The prompt, and which vectors are wanted."""
        width, pooling = options.truncate_dim, options.pooling
        if width is not None and width > self.model.full_dimensions:
            raise InputError(f"truncate_dim is {width}; vectors have {self.model.full_dimensions} dimensions")
        poolings = self.embedding.poolings if pooling is None else (pooling,)
        tokens = not poolings if options.multi_vector is None else options.multi_vector
        if not tokens and not poolings:
            raise InputError("the checkpoint has a vector for every token and pools none; give pooling, such as 'mean'")
        normalize = tokens if options.normalize is None else options.normalize
        cut = (self.model.is_layout or None) if options.truncation is None else options.truncation
        return ResolvedOptions.kept(
            prompt=self.prompt(options.prompt_name, options.prompt),
            **{**options.tokenizing, "truncation": cut},
            kind=VectorKind(() if tokens else poolings, normalize, width),
        )

    def prepare(self, items: list[Any], options: ResolvedOptions) -> list[list[SpannedRow]]:
        texts = [check_fields(item, ["text"], self.task)["text"] if isinstance(item, dict) else item for item in items]
        for text in texts:
            check_text(text)
        prompt, skip = options.prompt, self.skipped(options.prompt)
        encodings = self.tokenize([prompt + text for text in texts], **options.tokenizing)
        rows = []
        for item, text, encoding in zip(items, texts, encodings, strict=True):
            spans = item.get("spans") if isinstance(item, dict) else None
            length = len(encoding.ids)
            if spans is not None and not options.kind.poolings:
                raise InputError("spans and multi_vector are given; a text has vectors of spans or of tokens")
            wanted = [(min(skip, length), length)]
            if spans is not None:
                wanted = _token_spans(encoding, spans, text, len(prompt))
            rows.append([SpannedRow(encoding.ids, wanted, are_parts=spans is not None)])
        return rows

    def run(self, rows: list[SpannedRow], options: ResolvedOptions) -> Results[torch.Tensor]:
        """Vectors (spans or tokens, dimensions) of each row."""
        return self.vectors(rows, options.kind)

    def finish(self, job: Job[SpannedRow, torch.Tensor], options: ResolvedOptions) -> Vectors:
        vectors: Vectors = job.results[0].numpy()
        return vectors[0].copy() if options.kind.poolings and not job.rows[0].are_parts else vectors.copy()


def _check_head(model: str | Path, source: Source) -> None:
    """Refuse a classifier with one label, which is a cross-encoder, and warn of any other head that is left out."""
    config = AutoConfig.from_pretrained(**source.arguments)
    kind = kind_of(config.extra) if isinstance(config, ModernBertConfig) else None  # decoders are refused later
    if kind == "sequence-classification" and config.num_labels == 1:
        raise CheckpointError(
            f"{model} is a classifier with one label (a cross-encoder), which scores texts and has no vectors of them; "
            "use pipeline('text-ranking', ...)"
        )
    if kind in TRAINED_HEADS:
        logger.warning(
            "%s is a model for %s; its head is not used, and vectors are means of its encoder's states, which it was "
            "not trained to compare",
            model,
            kind,
        )


def _token_spans(encoding: Encoding, spans: Any, text: str, shift: int) -> list[tuple[int, int]]:
    """Tokens of each span of characters, which are `shift` further in what was tokenized."""
    if not isinstance(spans, list | tuple) or not spans or all(isinstance(x, int) for x in spans):
        raise InputError(f"spans is {shown(spans)}; give a list of pairs of characters, [(start, end), ...]")
    out = []
    offsets = encoding.offsets
    real = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
    for span in spans:
        pair = tuple(span) if isinstance(span, list | tuple) else ()
        if len(pair) != 2 or not all(isinstance(x, int) for x in pair) or not 0 <= pair[0] < pair[1] <= len(text):
            raise InputError(f"spans holds {shown(span)}; the text has characters 0 to {len(text)}")
        start, end = pair[0] + shift, pair[1] + shift
        inside = [i for i in real if offsets[i][0] < end and offsets[i][1] > start]
        if not inside:
            raise InputError(f"spans holds {shown(span)}, where no token is, or none within the context of the model")
        out.append((inside[0], inside[-1] + 1))
    return out
