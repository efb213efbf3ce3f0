"""MaxSim, the similarity of late interaction: for each vector of a query the best one of a document, added up.

The products of all pairs of vectors are never held: on a CPU a kernel keeps the largest while it multiplies, elsewhere
they are made for some documents after the other.

Shapes: Q queries, q vectors of all of them, B documents, T vectors of all of them, D dimensions.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modernbert.engines.cpu import library as cpu
from modernbert.engines.cpu.operations import NativeWeight, maxima
from modernbert.engines.gpu import operations as gpu
from modernbert.errors import InputError, shown
from modernbert.nn.linear import linear

_QUERY_VECTORS = 1024  # multiplied together
_MAXIMA = 2**22  # held at a time: 16 MiB
_PRODUCTS = 2**20  # likewise, where there is no kernel


def maxsim(queries: Any, documents: Any, lengths: Sequence[int] | None = None) -> float | NDArray[np.float32]:
    """Similarities of late interaction: for each vector of a query the largest dot product with the document's, added.

    Args:
        queries: vectors (tokens, D) of one query, or a list of such; arrays or tensors, as `late-interaction` gives
            them.
        documents: likewise; or with `lengths` the vectors of all documents end to end, (T, D).
        lengths: vectors of each document.

    Returns:
        A number for one query and one document; (B,) for one query, (Q, B) for several, float32. Each has the same bits
        whatever else of its dtype is compared, on a CPU; vectors of several dtypes are compared in float32. Where a
        vector has a NaN, it is NaN.

    Raises:
        InputError: a query or document has no vectors, or dimensions or devices differ.

    Source: ColBERT, arXiv:2004.12832.
    """
    one_query, one_document = not isinstance(queries, list | tuple), not isinstance(documents, list | tuple)
    packed: Tensor | None = None
    asked = [_vectors("queries", x) for x in ([queries] if one_query else queries)]
    if lengths is not None:
        one_document, packed = False, _vectors("documents", documents)
        try:
            counts = [operator.index(length) for length in lengths]
        except TypeError as error:
            raise InputError(f"lengths is {shown(lengths)}; give the number of vectors of each document") from error
        if sum(counts) != len(packed) or min(counts, default=1) < 0:
            least = "" if min(counts, default=1) >= 0 else f" and hold {min(counts)}"
            raise InputError(f"lengths add up to {sum(counts)}{least}; documents has {len(packed)} vectors")
        found: Sequence[Tensor] = packed.split(counts)
    else:
        found = [_vectors("documents", x) for x in ([documents] if one_document else documents)]
    for name, vectors in (("queries", asked), ("documents", found)):
        if any(not len(x) for x in vectors):
            number = next(i for i, x in enumerate(vectors) if not len(x))
            raise InputError(f"{name}[{number}] has no vectors; each needs at least one")
    kinds = {(x.shape[1], x.device.type) for x in (*asked, *found)}
    if len(kinds) > 1:
        found_kinds = " and ".join(f"{dimensions} dimensions on {where}" for dimensions, where in sorted(kinds))
        raise InputError(f"the vectors have {found_kinds}; they must be alike")
    scores_QB = np.zeros((len(asked), len(found)), np.float32)
    # PyTorch's products depend on how many vectors a query is multiplied together with; the kernels' do not.
    together = _QUERY_VECTORS if cpu.library() is not None else 1
    for first, some in _together(asked, together) if found else ():
        scores_QB[first : first + len(some)] = _scores(some, found, packed)
    if one_query and one_document:
        return float(scores_QB[0, 0])
    return scores_QB[0] if one_query else scores_QB[:, 0] if one_document else scores_QB


def packed_maxsim(
    query_qD: Tensor, document_TD: Tensor, query_lengths: Sequence[int], document_lengths: Sequence[int]
) -> Tensor:
    """Similarities (Q, B) of packed queries and documents, float32, through which gradients flow.

    Args:
        query_qD, document_TD: vectors of all queries and of all documents, end to end.
        query_lengths, document_lengths: vectors of each; none may have none.
    """
    best_Bq: Tensor = _Best.apply(query_qD.float(), document_TD.float(), tuple(document_lengths))
    return torch.stack([best_qB.sum(1) for best_qB in best_Bq.split(list(query_lengths), 1)])


class _Best(torch.autograd.Function):
    """For each vector of the queries its largest product with a vector of each document, (B, q).

    What is kept for the gradients is which vector that was, and no products.
    """

    @staticmethod
    def forward(ctx: Any, query_qD: Tensor, document_TD: Tensor, lengths: tuple[int, ...]) -> Tensor:
        best, places = [], []
        for _, some in _together(document_TD.split(list(lengths)), _PRODUCTS // len(query_qD)):
            products_Tq = torch.cat(list(some)) @ query_qD.T
            for part_Tq in products_Tq.split([len(document) for document in some]):
                largest = part_Tq.max(0)
                best.append(largest.values)
                places.append(largest.indices.int())
        ctx.lengths = lengths
        ctx.save_for_backward(query_qD, document_TD, torch.stack(places))
        return torch.stack(best)

    @staticmethod
    def backward(ctx: Any, grad_Bq: Tensor) -> tuple[Tensor, Tensor, None]:
        query_qD, document_TD, places_Bq = ctx.saved_tensors
        grad_query_qD, grads = torch.zeros_like(query_qD), []
        for first, some in _together(document_TD.split(list(ctx.lengths)), _PRODUCTS // len(query_qD)):
            block_TD, sizes = torch.cat(list(some)), [len(document) for document in some]
            # The gradients of the products: of each document those of its best vectors, else zeros.
            products_Tq = block_TD.new_zeros(len(block_TD), len(query_qD))
            for i, part_Tq in enumerate(products_Tq.split(sizes), first):
                part_Tq.scatter_(0, places_Bq[i : i + 1].long(), grad_Bq[i : i + 1])
            grads.append(products_Tq @ query_qD)
            grad_query_qD += products_Tq.T @ block_TD
        return grad_query_qD, torch.cat(grads), None


def _vectors(name: str, given: Any) -> Tensor:
    vectors = _tensor(given) if isinstance(given, np.ndarray) and given.dtype.kind == "f" else given
    is_dense = isinstance(vectors, Tensor) and vectors.layout == torch.strided
    if not is_dense or vectors.dim() != 2 or not vectors.is_floating_point():
        shape = f" of shape {tuple(vectors.shape)}" if isinstance(vectors, Tensor | np.ndarray) else ""
        what = f"{type(given).__name__}{shape}"
        raise InputError(f"{name} holds a {what}; give floats of shape (tokens, dimensions), or a list of such")
    return vectors.detach()


def _tensor(given: NDArray[Any]) -> Tensor:
    """An array's numbers, without a copy where PyTorch can have them; they are only read."""
    if not given.dtype.isnative or min(given.strides, default=0) < 0:
        given = given.astype(given.dtype.newbyteorder("="))
    with warnings.catch_warnings(action="ignore"):  # of arrays that cannot be written to
        return torch.from_numpy(given)


def _together(texts: Sequence[Tensor], most: int) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Runs of texts with at most so many vectors, or a single text; and the number of the first one."""
    first, size = 0, 0
    for number, text in enumerate(texts):
        if size and size + len(text) > most:
            yield first, texts[first:number]
            first, size = number, 0
        size += len(text)
    if size:
        yield first, texts[first:]


def _with_nan(vectors_TD: Tensor, lengths: Sequence[int]) -> list[int]:
    """Numbers of the texts with a NaN in a vector."""
    if not bool(vectors_TD.sum().isnan()):
        return []
    found = vectors_TD.isnan().any(1).split(list(lengths))
    return [number for number, some in enumerate(found) if bool(some.any())]


@torch.no_grad()
def _scores(
    queries: Sequence[Tensor], documents: Sequence[Tensor], packed_TD: Tensor | None = None
) -> NDArray[np.float32]:
    """(Q, B) of some queries; the documents may lie end to end already."""
    query_qD = torch.cat(list(queries))
    dtypes = {x.dtype for x in (query_qD, *documents)}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    query_qD = query_qD.to(dtype)
    weight = NativeWeight(query_qD) if cpu.serving(dtype, query_qD.device) is not None else None
    nan_q = query_qD.isnan().any(1)
    count = torch.tensor([len(query) for query in queries], device=query_qD.device)
    parts, row = [], 0
    most, size = _MAXIMA // len(query_qD) + 1, _PRODUCTS // len(query_qD)
    texts = (documents[i : i + most] for i in range(0, len(documents), most))
    for some in texts if weight is not None else (some for _, some in _together(documents, size)):
        lengths = [len(text) for text in some]
        rows = slice(row, row := row + sum(lengths))
        document_TD = (torch.cat(list(some)) if packed_TD is None else packed_TD[rows]).to(dtype)
        if weight is not None:
            best_Bq = maxima(weight, document_TD, lengths)
        else:
            on_card = gpu.serving(dtype, document_TD.device)
            products_Tq = gpu.product(document_TD, query_qD) if on_card else linear(document_TD, query_qD)
            of_texts = torch.tensor(lengths, device=document_TD.device)
            best_Bq = torch.segment_reduce(products_Tq.float(), "max", lengths=of_texts, axis=0)
        # A kernel that keeps the largest passes over products that are none.
        best_Bq[_with_nan(document_TD, lengths)] = math.nan
        best_Bq[:, nan_q] = math.nan
        # One after the other, so that a query's sum does not depend on the other queries.
        parts.append(torch.segment_reduce(best_Bq.T.contiguous(), "sum", lengths=count, axis=0).cpu())
    return torch.cat(parts, 1).numpy()
