"""PyTorch's scaled_dot_product_attention, called so that a text's bits do not depend on how the call is made.

On a CPU the order of its sums depends on three things that have nothing to do with the text: where in memory a row
begins (that of each thread's own scores too, which hold a row a query), whether a single head of a single text is all
that there is (several threads then share each product), and in bfloat16 the number of threads. Calls made here have
whole cache lines for rows, queries in fours, at least two heads, and float32 numbers (docs/invariance.md).

Shapes: N texts or blocks, H heads, Q queries and K keys of each, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LINE = 64  # bytes of a cache line, which is also the widest vector
_NUMBERS = _LINE // 4  # float32 numbers of a line
_TOGETHER = 4  # queries; fewer are computed by instructions of another kind


def dense_attention(
    q_NHQD: Tensor,
    k_NHKD: Tensor,
    v_NHKD: Tensor,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """Softmax attention of every query to every key, scores scaled by D**-0.5: (N, H, Q, D), in the queries' dtype.

    Args:
        q_NHQD: queries.
        k_NHKD: keys, of the queries' dtype or a wider one, in which they are then computed.
        v_NHKD: values, likewise.
        bias: added to the scores; broadcast to (N, H, Q, K).
        dropout: of the weights.
        causal: whether query i sees keys 0 to i alone.
    """
    dtype, size, scale = q_NHQD.dtype, q_NHQD.shape[-1], q_NHQD.shape[-1] ** -0.5
    q, k, v = q_NHQD.to(k_NHKD.dtype), k_NHKD, v_NHKD
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        bias = None if bias is None else bias.to(q.dtype)
        return _attend(q, k, v, bias, dropout, causal, scale).to(dtype)
    texts, heads, queries = q.shape[:3]
    if k.dtype in (torch.bfloat16, torch.float16) and not _needs_gradient(q, k, v):
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (_on_lines(x) for x in (q, k, v))
    bias = None if bias is None else bias.to(q.dtype)
    if queries % _TOGETHER:
        q = F.pad(q, (0, 0, 0, -queries % _TOGETHER))
        if bias is not None and bias.shape[-2] > 1:
            bias = F.pad(bias, (0, 0, 0, -queries % _TOGETHER))
    if texts * heads == 1:
        q, k, v = (x.expand(2, -1, -1, -1) for x in (q, k, v))
    out = _attend(q, k, v, bias, dropout, causal, scale)
    return out[:texts, :, :queries, :size].to(dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float, causal: bool, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=causal, scale=scale)


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _on_lines(x_NHLD: Tensor) -> Tensor:
    """The same numbers, each row at the beginning of a cache line; zeros are added at the rows' ends where need be."""
    extra = -x_NHLD.shape[-1] % _NUMBERS
    if extra:
        return F.pad(x_NHLD, (0, extra))
    return x_NHLD if x_NHLD.data_ptr() % _LINE == 0 else x_NHLD.clone()
