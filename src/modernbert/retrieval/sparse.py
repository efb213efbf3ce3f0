"""Sparse vectors of texts: a weight for each entry of the vocabulary, most of them zero.

A text's weight of an entry is log(1 + relu(logit)) of the masked language model, the largest over the text's tokens
(SPLADE). Tokens are scored a few at a time, so that the logits of all of them are never held together.

Shapes: B texts, T real tokens of all texts together, M hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from modernbert.checks import Options, option
from modernbert.errors import CheckpointError, InputError, listed, shown
from modernbert.io.checkpoint import read_weights, weight_files, weight_names, write_weights
from modernbert.io.files import write_text
from modernbert.io.hub import Source
from modernbert.models.formats import weight_format
from modernbert.models.heads import ModernBertForMaskedLM
from modernbert.models.sentence_encoder import Encoder
from modernbert.models.sentence_layout import (
    LATE_INTERACTION,
    MODULES,
    ROUTES,
    SENTENCE_ENCODER,
    SETTINGS,
    TRANSFORMER_SETTINGS,
    Contents,
    contents_of,
    kind_of_part,
    settings_of,
)
from modernbert.nn.inputs import Inputs
from modernbert.nn.packing import PackedInputs, Packing

_SCORED = 128  # tokens whose logits are held together
_MLM, _POOLING, _STATIC = "MLMTransformer", "SpladePooling", "SparseStaticEmbedding"
_TYPES = "sentence_transformers.sparse_encoder.models."


@dataclasses.dataclass(frozen=True)
class SparseVector:
    """The weights of one text that are not zero.

    Attributes:
        indices: (N,) int32, entries of the vocabulary in ascending order.
        values: (N,) float32, their weights.
        dimensions: size of the vocabulary.
    """

    indices: NDArray[np.int32]
    values: NDArray[np.float32]
    dimensions: int

    def __len__(self) -> int:
        return len(self.indices)

    @classmethod
    def of(cls, weights_V: Tensor, top_k: int | None = None) -> Self:
        """That of a dense row on the CPU; with `top_k` only the largest weights, of equal ones the first entries."""
        indices = weights_V.nonzero()[:, 0]
        if top_k is not None and len(indices) > top_k:
            order = torch.argsort(weights_V[indices], descending=True, stable=True)[:top_k]
            indices = indices[order].sort().values
        values = weights_V[indices].float().numpy()
        return cls(indices.to(torch.int32).numpy(), values, len(weights_V))

    def dot(self, other: SparseVector) -> float:
        """The similarity of two texts: the sum of products of weights that both have."""
        _, mine, theirs = np.intersect1d(self.indices, other.indices, assume_unique=True, return_indices=True)
        return float(np.dot(self.values[mine].astype(np.float64), other.values[theirs].astype(np.float64)))

    def tokens(self, tokenizer: Any) -> dict[str, float]:
        """The weight of each entry by its token, as search engines take it; the largest first."""
        order = np.argsort(-self.values, kind="stable")
        names = tokenizer.convert_ids_to_tokens(self.indices[order].tolist())
        return dict(zip(names, self.values[order].tolist(), strict=True))


def to_csr(vectors: Sequence[SparseVector], dimensions: int) -> Any:
    """Vectors as a matrix of scipy, (B, V) in compressed rows.

    Raises:
        InputError: scipy is not installed.
    """
    try:
        from scipy.sparse import csr_matrix
    except ImportError as error:
        raise InputError("a matrix of sparse vectors needs scipy: pip install scipy") from error
    starts = np.cumsum([0, *map(len, vectors)])
    empty = np.zeros(0)
    indices = np.concatenate([empty.astype(np.int32), *(vector.indices for vector in vectors)])
    values = np.concatenate([empty.astype(np.float32), *(vector.values for vector in vectors)])
    return csr_matrix((values, indices, starts), shape=(len(vectors), dimensions))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseSettings(Options):
    """What a folder says about sparse vectors besides weights."""

    error: ClassVar[type[ValueError]] = CheckpointError

    pooling: str = option("max", "How the weights of tokens become the text's", choices=("max", "sum"))
    activation: str = option(
        "relu", "What makes weights of logits: log(1 + relu), once or twice", choices=("relu", "log1p_relu")
    )
    top_k: int | None = option(None, "Most weights of a text.", least=1, otherwise="all")
    max_length: int | None = option(None, "Tokens that a text is cut to.", least=1, otherwise="the model's context")
    prompts: dict[str, str] = dataclasses.field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity: str = "dot"


class SparseEncoder(Encoder):
    """A masked language model whose logits become sparse vectors, and static weights for queries where there are any.

    Args:
        model: the masked language model.
        settings: pooling, prompts and the like.
        static_V: the weight of each entry of the vocabulary in queries, which then need no forward pass: a query has
            the weights of its tokens. None if queries are read by the model.

    Source: SPLADE v2, arXiv:2109.10086; queries without inference, arXiv:2411.04403; the folder layout of
    sentence-transformers.
    """

    def __init__(
        self, model: ModernBertForMaskedLM, settings: SparseSettings | None = None, static_V: Tensor | None = None
    ) -> None:
        super().__init__()
        self.model, self.settings = model, settings or SparseSettings()
        self.static_V = None if static_V is None else nn.Parameter(static_V.float())

    @property
    def dimensions(self) -> int:
        """Size of the vocabulary, V."""
        return int(max(self.config.vocab_size, 0 if self.static_V is None else len(self.static_V)))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """The weights of each text, dense; gradients reach the model through them.

        Args:
            input_ids: (B, S), or (T,) with `cu_seqlens`.
            attention_mask: (B, S), nonzero at real tokens.
            cu_seqlens: (B + 1,) cumulative lengths of packed texts.

        Returns:
            (B, V) float32. A row without real tokens is zero.
        """
        body = self.model.base_model
        inputs = body.pack_inputs(Inputs(input_ids, attention_mask, cu_seqlens=cu_seqlens))
        weights = list(self.weigh(inputs))
        return torch.stack(weights) if weights else torch.zeros(0, self.dimensions, device=self.device)

    def weigh(self, inputs: PackedInputs) -> Iterator[Tensor]:
        """The weights (V,) of each packed text, one text after the other."""
        states_TM = self.model.base_model.encode(inputs).last_TM
        largest = self.settings.pooling == "max"
        pooled_V: Tensor | None = None
        text, empty = 0, torch.zeros(self.dimensions, device=states_TM.device)
        for logits_NV, pieces in _scored(self.model.score, states_TM, inputs.packing):
            for owner, rows, ends in pieces:
                for _ in range(text, owner):  # of texts without tokens
                    yield empty
                piece_V = _largest(logits_NV[rows]) if largest else self._activate(logits_NV[rows]).sum(0)
                together = torch.maximum if largest else torch.add
                pooled_V = piece_V if pooled_V is None else together(pooled_V, piece_V)
                text = owner
                if ends:
                    weights_V = self._activate(pooled_V) if largest else pooled_V
                    yield nn.functional.pad(weights_V, (0, self.dimensions - len(weights_V)))
                    text, pooled_V = owner + 1, None
        for _ in range(text, len(inputs.packing.starts) - 1):
            yield empty

    def _activate(self, logits: Tensor) -> Tensor:
        """log(1 + relu) of logits, once or twice. It never falls, so it may follow the maximum."""
        weights = logits.float().relu().log1p()
        return weights.log1p() if self.settings.activation == "log1p_relu" else weights

    @torch.no_grad()
    def thin_out(self, texts: Sequence[Sequence[int]], entries: int) -> float:
        """Subtract a constant from all logits, so that texts have no more than this many entries on average.

        The softmax of a masked language model does not change with such a constant, so a model that was trained by it
        may have positive logits for its whole vocabulary; where to cut is free. The constant goes into the decoder's
        bias.

        Args:
            texts: ids of each.
            entries: mean number of weights that are left, with the pooling "max".

        Returns:
            The constant; 0 if the decoder has no bias, or texts have fewer entries already.
        """
        bias_V = self.model.decoder.bias
        if bias_V is None:
            return 0.0
        inputs = (PackedInputs.of_rows([ids], self.device) for ids in texts)
        states = (self.model.base_model.encode(one).last_TM for one in inputs)
        largest_BV = torch.stack([self.model.score(states_TM).float().amax(0).cpu() for states_TM in states])
        place = largest_BV.numel() - entries * len(largest_BV)
        constant = 0.0 if place < 1 else max(0.0, float(largest_BV.flatten().kthvalue(place).values))
        bias_V.sub_(constant)
        return constant

    def of_ids(self, ids: Sequence[int]) -> Tensor:
        """The weights (V,) of a query by its tokens alone, without a forward pass."""
        assert self.static_V is not None
        if unknown := [i for i in ids if not 0 <= i < len(self.static_V)]:
            raise InputError(f"a query has the token {unknown[0]}; there are static weights of {len(self.static_V)}")
        weights_V = torch.zeros(self.dimensions)
        index = torch.tensor(sorted(set(ids)), dtype=torch.long)
        weights_V[index] = self.static_V.detach().cpu()[index]
        return weights_V

    # Folders

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a folder or a Hub repository, in evaluation mode.

        Args:
            pretrained_model_name_or_path: in sentence-transformers' layout of a sparse encoder, or a masked language
                model, whose largest weights over the tokens are taken.
            kwargs: see `PreTrainedModel.from_pretrained`.

        Raises:
            NotFoundError: there is no such folder, repository or file.
            CheckpointError: the folder holds something else, or has parts that are not known here.
        """
        quantization = kwargs.pop("quantization_config", None)
        source = Source.pop_from(str(pretrained_model_name_or_path), dict(kwargs))
        contents = contents_of(source)
        if contents.kind in (SENTENCE_ENCODER, LATE_INTERACTION):
            raise CheckpointError(f"{contents.name} is a {contents.kind}, and has no sparse vectors")
        contents.refuse_cross_encoder()
        body = source.inside(contents.inner)
        kwargs["subfolder"] = body.subfolder
        model = ModernBertForMaskedLM.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if quantization is not None:
            model = weight_format().quantize(model, weight_format().resolve(quantization), body)
        encoder = cls(model, _settings(source, contents), _static(source, contents))
        encoder.is_layout = bool(contents.parts)
        return encoder.to(model.device).eval()

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Write a folder in sentence-transformers' layout.

        Args:
            folder: made where missing.
            tokenizer: saved into each part that has one; without it, save the tokenizer into the folder itself, or into
                the parts of documents and of queries if queries have static weights.
        """
        folder, settings = Path(folder), self.settings
        pooling = {"pooling_strategy": settings.pooling, "activation_function": settings.activation}
        pooling["embedding_dimension"] = self.config.vocab_size
        limits: dict[str, Any] = {"transformer_task": "fill-mask"}
        if settings.max_length is not None:
            limits["max_seq_length"] = settings.max_length
        about: dict[str, Any] = {
            "model_type": "SparseEncoder",
            "prompts": settings.prompts,
            "default_prompt_name": settings.default_prompt_name,
            "similarity_fn_name": settings.similarity,
        }
        if settings.top_k is not None:
            about["max_active_dims"] = settings.top_k
        routed = self.static_V is not None
        body, pool = (f"document_0_{_MLM}", f"document_1_{_POOLING}") if routed else ("", f"1_{_POOLING}")
        self.model.save_pretrained(folder / body)
        _write(folder / body / TRANSFORMER_SETTINGS, limits)
        _write(folder / pool / "config.json", pooling)
        types, homes = {body: _TYPES + _MLM, pool: _TYPES + _POOLING}, [folder / body]
        modules = [_module(i, path, types[path]) for i, path in enumerate(types)]
        if self.static_V is not None:
            query = f"query_0_{_STATIC}"
            write_weights(folder / query, {"weight": self.static_V.detach()})
            _write(folder / query / "config.json", {"frozen": False})
            types[query] = _TYPES + _STATIC
            structure = {"query": [query], "document": [body, pool]}
            parameters = {"default_route": "document", "allow_empty_key": True}
            _write(folder / ROUTES, {"types": types, "structure": structure, "parameters": parameters})
            modules, homes = [_module(0, "", "sentence_transformers.models.Router")], [*homes, folder / query]
        for home in homes if tokenizer is not None else ():
            tokenizer.save_pretrained(home)
        _write(folder / SETTINGS, about)
        _write(folder / MODULES, modules)  # last: it makes the folder a layout


def _scored(
    score: Callable[[Tensor], Tensor], states_TM: Tensor, packing: Packing
) -> Iterator[tuple[Tensor, list[tuple[int, slice, bool]]]]:
    """The logits of some tokens after the other, and of which texts they are.

    Each text is cut from its own start, so that how it is cut does not depend on the batch.

    Yields:
        Logits (N, V); for each text among them its number, its rows, and whether it ends there.
    """
    pieces = [
        (text, slice(start, min(start + _SCORED, end)), start + _SCORED >= end)
        for text, (first, end) in enumerate(packing.spans)
        for start in range(first, end, _SCORED)
    ]
    while pieces:
        first, count = pieces[0][1].start, 1
        while count < len(pieces) and pieces[count][1].stop - first <= _SCORED:
            count += 1
        taken, pieces = pieces[:count], pieces[count:]
        shifted = [(text, slice(rows.start - first, rows.stop - first), ends) for text, rows, ends in taken]
        yield score(states_TM[first : taken[-1][1].stop]), shifted


def _largest(logits_NV: Tensor) -> Tensor:
    """The largest logit of each entry, (V,). With gradients, by a function that keeps no logits for them."""
    return logits_NV.max(0).values if logits_NV.requires_grad else logits_NV.amax(0)


def _settings(source: Source, contents: Contents) -> SparseSettings:
    """What a folder says, checked."""
    if not contents.parts:
        return SparseSettings()
    kinds = [kind_of_part(part) for part in contents.parts]
    if kinds[0] not in ("Transformer", _MLM) or kinds[1:] != [_POOLING]:
        raise CheckpointError(
            f"{contents.name} has the parts {listed(kinds)}; a sparse encoder here is a masked language model and "
            f"{_POOLING}"
        )
    pooling = source.inside(contents.parts[1]["path"]).read_json("config.json")
    named = {"pooling": "pooling_strategy", "activation": "activation_function"}
    given: dict[str, Any] = {name: pooling[theirs] for name, theirs in named.items() if theirs in pooling}
    about = {**contents.about}
    similarity = about.get("similarity_fn_name")
    settings = settings_of(source, contents.inner)
    given |= {"similarity": similarity or "dot", "top_k": about.get("max_active_dims")}
    given |= {n: settings[n] for n in ("prompts", "default_prompt_name", "max_length") if n in settings}
    return SparseSettings.of(given, contents.name)


def _static(source: Source, contents: Contents) -> Tensor | None:
    """The static weights of queries, if the folder has a route for them.

    Raises:
        CheckpointError: queries are read in another way, or by another tokenizer.
    """
    if not contents.queries:
        return None
    kinds = [kind_of_part(part) for part in contents.queries]
    if kinds != [_STATIC]:
        raise CheckpointError(f"{contents.name} reads queries by {listed(kinds)}; known is {_STATIC}")
    there, body = source.inside(contents.queries[0]["path"]), source.inside(contents.inner)
    vocabularies = [place.read_json("tokenizer.json").get("model") for place in (there, body)]
    if vocabularies[0] != vocabularies[1]:
        raise CheckpointError(f"{contents.name} has other tokens for queries than for documents, which is not served")
    config = there.read_json("config.json") if there.find("config.json") is not None else {}
    if path := config.get("path"):
        return _from_json(there, str(path), body)
    files = weight_files(there)
    shapes = {name: shape for name, (_, shape, _) in weight_names(files).items()}
    if list(shapes) != ["weight"] or len(shapes["weight"]) != 1:
        raise CheckpointError(f"{contents.name} has the static weights {shown(shapes)}; they must be one row, weight")
    return dict(read_weights(files, lambda name: True))["weight"]


def _from_json(source: Source, path: str, body: Source) -> Tensor:
    """Static weights that a file names token by token."""
    weights: Mapping[str, Any] = source.read_json(Path(path).name)
    tokenizer = body.read_json("tokenizer.json")
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", ())}
    vocabulary = {**tokenizer["model"].get("vocab", {}), **added}
    if unknown := [token for token in weights if token not in vocabulary]:
        raise CheckpointError(f"{path} has weights of {listed(unknown, 3)}, which the tokenizer has not")
    row = torch.zeros(1 + max(vocabulary.values()))
    for token, weight in weights.items():
        row[vocabulary[token]] = float(weight)
    return row


def _module(number: int, path: str, kind: str) -> dict[str, Any]:
    return {"idx": number, "name": str(number), "path": path, "type": kind}


def _write(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")
