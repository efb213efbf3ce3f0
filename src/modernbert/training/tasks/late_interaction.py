"""Vectors of tokens, compared by MaxSim.

Shapes: B pairs of a step, R rows of a forward pass, N candidates, T tokens of all rows, D dimensions.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modernbert.errors import InputError
from modernbert.io.hub import Source
from modernbert.models.encoder import ModernBertModel
from modernbert.models.formats import refuse_to_train
from modernbert.models.sentence_encoder import Dense, Normalize, SentenceEncoder, refuse_decoder
from modernbert.models.sentence_layout import LATE_INTERACTION, SENTENCE_ENCODER, contents_of
from modernbert.pipelines.late_interaction import LateInteractionPipeline, scores_of
from modernbert.retrieval.maxsim import packed_maxsim
from modernbert.retrieval.multi_vector import Expansion, MultiVectorEncoder, MultiVectorSettings
from modernbert.text.tokenizer import Tokenizer
from modernbert.training.adapters import has_adapters
from modernbert.training.contract import Batch
from modernbert.training.examples import Example
from modernbert.training.tasks.contrastive import Contrastive
from modernbert.training.tasks.options import FinetuneOptions

_QUERY_LENGTH, _DOCUMENT_LENGTH = 32, 300  # of a new projection
_PREFIXES = {"query": "[unused0]", "document": "[unused1]"}  # of a new projection, where the tokenizer has these
_TEMPERATURE, _TEMPERATURE_OF_MEAN = 1.0, 0.05
_IDENTITY = "torch.nn.modules.linear.Identity"


class Tokens(list[int]):
    """The ids of a text, and which of its tokens count.

    Attributes:
        kept: whether each token's vector is compared.
        seen: how many first tokens all tokens see.
    """

    kept: list[bool]
    seen: int


class LateInteraction(Contrastive):
    """Anchors find their positives by MaxSim: for each vector of a query the best one of the document, added up.

    Queries are made longer and words are skipped in training as the finished model does it.

    Source: ColBERT, arXiv:2004.12832, and ColBERTv2, arXiv:2112.01488.
    """

    name = "late-interaction"
    auto_model = MultiVectorEncoder
    serve: LateInteractionPipeline

    def load(self, name: str | Path, options: FinetuneOptions) -> MultiVectorEncoder:
        """A late-interaction encoder; another encoder gets a new projection and the settings of ColBERT."""
        how: dict[str, Any] = {"dtype": torch.float32, "revision": options.revision}
        how["attn_implementation"] = options.attn_implementation
        source = Source(str(name), options.revision)
        contents = contents_of(source)
        self.is_new = contents.kind != LATE_INTERACTION
        if not self.is_new:
            model = MultiVectorEncoder.from_pretrained(name, **how)
        else:
            if contents.kind == SENTENCE_ENCODER:
                sentences = SentenceEncoder.from_pretrained(name, **how)
                body, self.prompts = sentences.model, {**sentences.settings.prompts, **self.prompts}
            else:
                contents.refuse_cross_encoder()
                contents.refuse_unserved()
                refuse_decoder(source.inside(contents.inner))
                body = ModernBertModel.from_pretrained(name, **how)
            dense = Dense(body.config.hidden_size, self.options.dimensions, bias=False, activation=_IDENTITY)
            model = MultiVectorEncoder(body, MultiVectorSettings(), [dense.to(body.device), Normalize()])
        refuse_to_train(model.config, str(name))
        self.model = model
        return model

    def set_tokenizer(self, tokenizer: Tokenizer, context: int) -> None:
        """Also set what the encoder's folder will say: lengths, prompts, expansion, skipped words."""
        super().set_tokenizer(tokenizer, context)
        given, model, known = self.options, self.model, tokenizer.get_vocab()
        settings = model.settings
        for name in ("query_length", "document_length"):
            if (length := getattr(given, name)) is not None and length > self.max_length:
                raise InputError(f"{name} is {length}; texts have at most {self.max_length} tokens (max_length)")
        prompts, prefixes = {**settings.prompts, **self.prompts}, settings.prefixes
        if self.is_new and not prompts and all(prefix in known for prefix in _PREFIXES.values()):
            prompts, prefixes = dict(_PREFIXES), tuple(_PREFIXES.values())
        document_length = given.document_length or settings.document_length
        if document_length is None and self.is_new:
            document_length = min(_DOCUMENT_LENGTH, self.max_length)
        expansion, before = settings.expansion, settings.expansion
        length = given.query_length or (before.length if before is not None else settings.query_length)
        length = length or (min(_QUERY_LENGTH, self.max_length) if self.is_new else None)
        kind = "fixed" if given.expansion == "auto" and self.is_new else given.expansion
        if kind == "none":
            expansion = None
        elif kind != "auto":
            if length is None:
                raise InputError(f"expansion is {kind} and the model has no length of queries; give query_length")
            expansion = Expansion(
                length, kind == "fixed", given.attend_expansion, before.token if before is not None else None
            )
        elif before is not None:
            assert length is not None
            expansion = dataclasses.replace(before, length=length, attend=before.attend or given.attend_expansion)
        words = given.skipped_words
        if words is None and self.is_new:
            words = "punctuation"
        chosen = string.punctuation if words == "punctuation" else () if words == "none" else (words or "").split()
        model.settings = dataclasses.replace(
            settings,
            prompts=prompts,
            prefixes=prefixes,
            document_length=document_length,
            query_length=length if expansion is None else settings.query_length,
            expansion=expansion,
            skipped_words=settings.skipped_words if words is None else tuple(chosen),
        )
        training = model.training
        self.serve = LateInteractionPipeline(model, tokenizer)
        model.train(training)

    @property
    def temperature(self) -> float:
        """What is given, or what suits a sum of cosines or their mean."""
        given = self.options.temperature
        is_mean = self.model.settings.similarity == "meanmaxsim"
        return float(given) if given is not None else _TEMPERATURE_OF_MEAN if is_mean else _TEMPERATURE

    def rows_of(self, texts: Sequence[str], is_query: bool) -> list[Any]:
        """As the pipeline reads them."""
        prompt, rows = self.serve.prompt(is_query), []
        for row in self.serve.rows_of(texts, is_query, prompt, True, self.max_length):
            tokens, kept = Tokens(row.ids), set(row.kept)
            tokens.kept, tokens.seen = [i in kept for i in range(len(tokens))], row.seen
            if not any(tokens.kept):
                raise InputError(f"of a text of {len(tokens)} tokens all are skipped words; skip fewer")
            rows.append(tokens)
        return rows

    def labels(self, examples: Sequence[Example]) -> Batch:
        rows = [row for example in examples for row in example.rows]
        kept = [kept for row in rows for kept in row.kept]
        return {**super().labels(examples), "kept": torch.tensor(kept), "seen": torch.tensor([r.seen for r in rows])}

    def vectors(self, model: nn.Module, batch: Batch) -> Tensor:
        """(T, D) of all tokens."""
        ids = {"input_ids": batch["input_ids"], "cu_seqlens": batch["cu_seqlens"]}
        vectors: Tensor = model(**ids, seen=batch["seen"].tolist())
        return vectors

    def similarities(self, vectors: Tensor, is_anchor_R: Tensor, step: Batch) -> list[Tensor]:
        lengths = step["lengths"].tolist()
        of_anchors, sizes = is_anchor_R.tolist(), [int(part.sum()) for part in step["kept"].cpu().split(lengths)]
        parts = vectors[step["kept"]].split(sizes)
        sides = [[part for part, is_anchor in zip(parts, of_anchors, strict=True) if is_anchor == it] for it in (1, 0)]
        counts = [[len(part) for part in side] for side in sides]
        scores_BN = packed_maxsim(torch.cat(sides[0]), torch.cat(sides[1]), *counts)
        if self.model.settings.similarity == "meanmaxsim":
            scores_BN = scores_BN / torch.tensor(counts[0], device=scores_BN.device)[:, None]
        return [scores_BN]

    # Evaluation

    def extra_inputs(self, rows: Sequence[Any]) -> dict[str, Any]:
        return {"seen": [row.seen for row in rows]}

    def outputs(self, model: Any, examples: Sequence[Example]) -> list[Any]:
        """The vectors that count."""
        found = super().outputs(model, examples)
        rows = (example.rows[0] for example in examples)
        return [vectors[torch.tensor(row.kept)] for row, vectors in zip(rows, found, strict=True)]

    def compared(self, anchors: list[Any], documents: list[Any]) -> Iterator[tuple[str, Iterator[Tensor]]]:
        similarity = self.model.settings.similarity
        parts = (anchors[i : i + 256] for i in range(0, len(anchors), 256))
        yield "", (torch.from_numpy(scores_of(similarity, some, documents)) for some in parts)

    # Folders

    def save(self, model: Any, folder: Path) -> None:
        """Write the folder for the library that is named, or for PyLate if its layout holds what the model has."""
        if has_adapters(model):
            super().save(model, folder)
            return
        layout = self.options.layout
        if layout == "auto":
            settings = model.settings
            known, prompts = self.tokenizer.get_vocab(), [settings.prompts.get(n, "") for n in ("query", "document")]
            plain = settings.expansion is None or (settings.expansion.is_fixed and settings.expansion.token is None)
            held = plain and settings.pool_factor == 1 and settings.similarity == "maxsim"
            layout = "pylate" if held and all(prompt in known for prompt in prompts) else "sentence-transformers"
        model.save_pretrained(folder, layout, self.tokenizer)
