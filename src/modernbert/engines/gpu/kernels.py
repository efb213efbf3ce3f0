"""The kernels themselves. Each row of a result depends on its own inputs alone, bit for bit, whatever else there is:
sums run in one order, and a tile's size never follows the number of rows. Nor is any kernel built anew for it.
docs/invariance.md says why.

Shapes: T rows, I inputs, O outputs, M width, H heads, D head size, P pairs of columns, N texts.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def activate(x, NAME: tl.constexpr):
    """An activation of float32 numbers, by the name that configurations use."""
    if NAME == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_new" or NAME == "gelu_pytorch_tanh":
        x = 0.5 * x * (1 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif NAME == "relu":
        x = tl.where(x > 0, x, 0.0)
    elif NAME == "silu" or NAME == "swish":
        x = x * tl.sigmoid(x)
    elif NAME == "tanh":
        x = _tanh(x)
    elif NAME == "sigmoid":
        x = tl.sigmoid(x)
    else:
        tl.static_assert(NAME == "")
    return x


@triton.jit
def _place(tile, T, wide, TILE_T: tl.constexpr, GROUP: tl.constexpr):
    """First row of a tile of a product, and its place among the tiles of columns.

    Tiles of GROUP rows of tiles run together and share what is cached.
    """
    of_group = GROUP * wide
    first = tile // of_group * GROUP
    high = min(tl.cdiv(T, TILE_T) - first, GROUP)
    within = tile % of_group
    return (first + within % high) * TILE_T, within // high


# Where COPIED, x, weight and out of the products are descriptors, whose tiles a unit of the card copies: what is read
# past their ends is 0, and nothing is written there. Else they are pointers, whose rows lie a stride apart.


@triton.jit
def _write(x_TO, out, stride, row, column, T, outputs, COPIED: tl.constexpr, TILE_T: tl.constexpr, WIDTH: tl.constexpr,
           ADD: tl.constexpr):  # fmt: skip
    """Write a tile, or add it to what is there."""
    if COPIED:
        if ADD:
            x_TO += out.load([row, column]).to(tl.float32)
        out.store([row, column], x_TO.to(out.dtype))
    else:
        t_T, o_O = row + tl.arange(0, TILE_T), column + tl.arange(0, WIDTH)
        at_TO = out + t_T.to(tl.int64)[:, None] * stride + o_O[None, :]
        there = (t_T < T)[:, None] & (o_O < outputs)[None, :]
        if ADD:
            x_TO += tl.load(at_TO, mask=there, other=0.0).to(tl.float32)
        tl.store(at_TO, x_TO.to(out.dtype.element_ty), mask=there)


@triton.jit
def _columns(numbers, column, outputs, WIDTH: tl.constexpr):
    """Numbers of some outputs, as a row."""
    o_O = column + tl.arange(0, WIDTH)
    return tl.load(numbers + o_O, mask=o_O < outputs, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _dot(x, x_stride, weight, weight_stride, row, column, T, inputs, outputs, GATED: tl.constexpr,
         COPIED: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
         TILE_T: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr):  # fmt: skip
    """Sums of a tile of rows times outputs, (TILE_T, TILE_O), in steps of TILE_I.

    A gated weight is (2, outputs, I), and the tile has as many columns of its first half as of its second. EVEN says
    that I is a multiple of TILE_I.
    """
    if not COPIED:
        t_T, o_O, i_I = row + tl.arange(0, TILE_T), tl.arange(0, TILE_O), tl.arange(0, TILE_I)
        x_TI = x + t_T.to(tl.int64)[:, None] * x_stride + i_I[None, :]
        within_O = column + (o_O % (TILE_O // 2) if GATED else o_O)
        read_O = tl.where(within_O < outputs, within_O, 0)  # what is computed past the end is not written
        if GATED:
            read_O += o_O // (TILE_O // 2) * outputs
        weight_OI = weight + read_O[:, None] * weight_stride + i_I[None, :]
    sum_TO = tl.zeros((TILE_T, TILE_O), tl.float32)
    for start in range(0, inputs, TILE_I):
        if COPIED:
            a_TI = x.load([row, start])
            b_OI = tl.reshape(weight.load([0, column, start] if GATED else [column, start]), (TILE_O, TILE_I))
        elif EVEN:
            a_TI = tl.load(x_TI + start, mask=(t_T < T)[:, None], other=0.0)
            b_OI = tl.load(weight_OI + start)
        else:
            left = (i_I < inputs - start)[None, :]
            a_TI = tl.load(x_TI + start, mask=(t_T < T)[:, None] & left, other=0.0)
            b_OI = tl.load(weight_OI + start, mask=left, other=0.0)
        if WIDEN:
            a_TI, b_OI = a_TI.to(tl.float32), b_OI.to(tl.float32)
        sum_TO = tl.dot(a_TI, b_OI.T, sum_TO, input_precision="ieee")
    return sum_TO


@triton.jit
def _halves(x_TO, TILE_T: tl.constexpr, TILE_O: tl.constexpr):
    """Left and right half of a tile's columns; both are in the same threads."""
    return tl.split(tl.permute(tl.reshape(x_TO, (TILE_T, 2, TILE_O // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["T"])
def product(x, x_stride, weight, weight_stride, bias, out, out_stride, T, inputs, outputs,
            BIAS: tl.constexpr, ACTIVATION: tl.constexpr, ADD: tl.constexpr, COPIED: tl.constexpr, EVEN: tl.constexpr,
            WIDEN: tl.constexpr, TILE_T: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr,
            GROUP: tl.constexpr):  # fmt: skip
    """out = activation(x @ weight.T + bias), or what out was plus that. Written in halves, which take less memory."""
    WIDTH: tl.constexpr = TILE_O // 2
    wide = tl.cdiv(outputs, TILE_O)
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, TILE_T) * wide, tl.num_programs(0), flatten=COPIED):
        row, column = _place(tile, T, wide, TILE_T, GROUP)
        column *= TILE_O
        sum_TO = _dot(x, x_stride, weight, weight_stride, row, column, T, inputs, outputs, False, COPIED, EVEN, WIDEN,
                      TILE_T, TILE_O, TILE_I)  # fmt: skip
        if BIAS:
            sum_TO += _columns(bias, column, outputs, TILE_O)
        left_TO, right_TO = _halves(activate(sum_TO, ACTIVATION), TILE_T, TILE_O)
        _write(left_TO, out, out_stride, row, column, T, outputs, COPIED, TILE_T, WIDTH, ADD)
        _write(right_TO, out, out_stride, row, column + WIDTH, T, outputs, COPIED, TILE_T, WIDTH, ADD)


@triton.jit(do_not_specialize=["T"])
def gated_product(x, x_stride, weight, weight_stride, bias, out, out_stride, T, inputs, P, BIAS: tl.constexpr,
                  ACTIVATION: tl.constexpr, COPIED: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
                  TILE_T: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """out = activation(first P outputs) * other P outputs, of x @ weight.T + bias, weight being (2, P, I)."""
    WIDTH: tl.constexpr = TILE_O // 2
    wide = tl.cdiv(P, WIDTH)
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, TILE_T) * wide, tl.num_programs(0), flatten=COPIED):
        row, column = _place(tile, T, wide, TILE_T, GROUP)
        column *= WIDTH
        sum_TO = _dot(x, x_stride, weight, weight_stride, row, column, T, inputs, P, True, COPIED, EVEN, WIDEN,
                      TILE_T, TILE_O, TILE_I)  # fmt: skip
        in_TP, gate_TP = _halves(sum_TO, TILE_T, TILE_O)
        if BIAS:
            in_TP += _columns(bias, column, P, WIDTH)
            gate_TP += _columns(bias + P, column, P, WIDTH)
        in_TP = activate(in_TP, ACTIVATION) * gate_TP
        _write(in_TP, out, out_stride, row, column, T, P, COPIED, TILE_T, WIDTH, False)


@triton.jit(do_not_specialize=["T"])
def rotated_product(x, x_stride, weight, weight_stride, bias, out, out_stride, cos, sin, T, inputs, outputs, ROTATED,
                    HALF: tl.constexpr, DTYPE: tl.constexpr, BIAS: tl.constexpr, COPIED: tl.constexpr,
                    EVEN: tl.constexpr, WIDEN: tl.constexpr, TILE_T: tl.constexpr, TILE_O: tl.constexpr,
                    TILE_I: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Queries, keys and values of rows. The heads, 2 * HALF columns each, that begin before column ROTATED are turned.

    cos and sin are (T, 2 * HALF), the sines signed as `nn.rotary.rope_tables` makes them.
    """
    HEADS: tl.constexpr = TILE_O // (2 * HALF)
    wide = tl.cdiv(outputs, TILE_O)
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, TILE_T) * wide, tl.num_programs(0), flatten=COPIED):
        row, column = _place(tile, T, wide, TILE_T, GROUP)
        column *= TILE_O
        sum_TO = _dot(x, x_stride, weight, weight_stride, row, column, T, inputs, outputs, False, COPIED, EVEN, WIDEN,
                      TILE_T, TILE_O, TILE_I)  # fmt: skip
        if BIAS:
            sum_TO += _columns(bias, column, outputs, TILE_O)
        # Both numbers of a pair, columns d and d + HALF of a head, are in the same thread.
        pairs_THD2 = tl.permute(tl.reshape(sum_TO.to(DTYPE), (TILE_T, HEADS, 2, HALF)), (0, 1, 3, 2))
        first_THD, second_THD = tl.split(pairs_THD2)
        t_T = row + tl.arange(0, TILE_T)
        angle_TD = t_T.to(tl.int64)[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
        cos_TD = tl.load(cos + angle_TD, mask=(t_T < T)[:, None], other=1.0)
        sin_TD = tl.load(sin + angle_TD + HALF, mask=(t_T < T)[:, None], other=0.0)
        turned = (column + tl.arange(0, HEADS) * (2 * HALF) < ROTATED)[None, :, None]
        cos_THD = tl.where(turned, cos_TD[:, None, :], 1.0)
        sin_THD = tl.where(turned, sin_TD[:, None, :], 0.0)
        left_THD = (first_THD * cos_THD - second_THD * sin_THD).to(DTYPE)
        right_THD = (second_THD * cos_THD + first_THD * sin_THD).to(DTYPE)
        turned_TO = tl.reshape(tl.permute(tl.join(left_THD, right_THD), (0, 1, 3, 2)), (TILE_T, TILE_O))
        _write(turned_TO, out, out_stride, row, column, T, outputs, COPIED, TILE_T, TILE_O, False)


@triton.jit
def attend_window(qkv, out, cu_seqlens, HEADS, row_stride, scale, LEFT: tl.constexpr, RIGHT: tl.constexpr,
                  D: tl.constexpr, FOLDED: tl.constexpr, BEHIND: tl.constexpr, AHEAD: tl.constexpr,
                  TILE_Q: tl.constexpr, TILE_K: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    """Attention of tokens to those of their text no more than LEFT before and RIGHT after them; a tile a program.

    qkv is (T, 3, H, D); scale is for exponentials of base 2. Keys from BEHIND before the tile to AHEAD after its
    first token are read, in tiles that a text's beginning places, so that the same sums are made in any batch.
    """
    text, head = tl.program_id(2), tl.program_id(1)
    begin, end = tl.load(cu_seqlens + text), tl.load(cu_seqlens + text + 1)
    length, first = end - begin, tl.program_id(0) * TILE_Q
    if first < length:
        q_Q, k_K, d_D = first + tl.arange(0, TILE_Q), tl.arange(0, TILE_K), tl.arange(0, FOLDED)
        queries = qkv + begin.to(tl.int64) * row_stride + head * D
        keys, values = queries + HEADS * D, queries + 2 * HEADS * D
        real_D = (d_D < D)[None, :]
        q_QD = tl.load(
            queries + q_Q[:, None] * row_stride + d_D[None, :], mask=(q_Q < length)[:, None] & real_D, other=0.0
        )
        most_Q = tl.full((TILE_Q,), -3e38, tl.float32)
        total_Q = tl.zeros((TILE_Q,), tl.float32)
        sum_QD = tl.zeros((TILE_Q, FOLDED), tl.float32)
        for offset in range(-BEHIND, AHEAD, TILE_K):
            at_K = first + offset + k_K
            inside = (at_K >= 0) & (at_K < length)
            read_KD = at_K[:, None] * row_stride + d_D[None, :]
            k_KD = tl.load(keys + read_KD, mask=inside[:, None] & real_D, other=0.0)
            v_KD = tl.load(values + read_KD, mask=inside[:, None] & real_D, other=0.0)
            if WIDEN:
                q_QD, k_KD = q_QD.to(tl.float32), k_KD.to(tl.float32)
            score_QK = tl.dot(q_QD, k_KD.T, input_precision="ieee") * scale
            ahead_QK = at_K[None, :] - q_Q[:, None]
            seen_QK = inside[None, :] & (ahead_QK >= -LEFT) & (ahead_QK <= RIGHT)
            score_QK = tl.where(seen_QK, score_QK, float("-inf"))
            higher_Q = tl.maximum(most_Q, tl.max(score_QK, 1))
            weight_QK = tl.exp2(score_QK - higher_Q[:, None])
            shrink_Q = tl.exp2(most_Q - higher_Q)
            total_Q = total_Q * shrink_Q + tl.sum(weight_QK, 1)
            weight_QK = weight_QK.to(v_KD.dtype)
            if WIDEN:
                weight_QK, v_KD = weight_QK.to(tl.float32), v_KD.to(tl.float32)
            sum_QD = tl.dot(weight_QK, v_KD, sum_QD * shrink_Q[:, None], input_precision="ieee")
            most_Q = higher_Q
        to_QD = (begin + q_Q).to(tl.int64)[:, None] * (HEADS * D) + head * D + d_D[None, :]
        total_Q = tl.where(total_Q > 0, total_Q, 1.0)  # rows past the text's end see nothing
        own_QD = (sum_QD / total_Q[:, None]).to(out.dtype.element_ty)
        tl.store(out + to_QD, own_QD, mask=(q_Q < length)[:, None] & real_D)


@triton.jit(do_not_specialize=["T"])
def normalize(table, ids, weight, bias, out, T, M, table_stride, out_stride, eps,
              IDS: tl.constexpr, BIAS: tl.constexpr, TILE_T: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """LayerNorm of rows, or of the rows of a table that ids name."""
    t_T = tl.program_id(0).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    m_M = tl.arange(0, WIDTH)
    in_T, in_M = t_T < T, m_M < M
    source_T = tl.load(ids + t_T, mask=in_T, other=0).to(tl.int64) if IDS else t_T
    real = in_T[:, None] & in_M[None, :]
    x_TM = tl.load(table + source_T[:, None] * table_stride + m_M[None, :], mask=real, other=0.0).to(tl.float32)
    apart_TM = tl.where(in_M[None, :], x_TM - (tl.sum(x_TM, 1) / M)[:, None], 0.0)
    y_TM = apart_TM * tl.rsqrt(tl.sum(apart_TM * apart_TM, 1) / M + eps)[:, None]
    y_TM *= tl.load(weight + m_M, mask=in_M, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        y_TM += tl.load(bias + m_M, mask=in_M, other=0.0).to(tl.float32)[None, :]
    tl.store(out + t_T[:, None] * out_stride + m_M[None, :], y_TM.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows"])
def rotate(q, k, v, cos, sin, out, rows, HEADS, row_stride, head_stride,
           HALF: tl.constexpr, FOLDED: tl.constexpr, BACK: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Queries and keys turned by their tokens' angles, or back, and values as they are, into one (T, 3, H, D).

    A row is a head of a token. FOLDED is HALF rounded up to a power of two.
    """
    part = tl.program_id(1)
    r_R = tl.program_id(0) * TILE + tl.arange(0, TILE)
    d_D = tl.arange(0, FOLDED)
    real = (r_R < rows)[:, None] & (d_D < HALF)[None, :]
    t_R, head_R = (r_R // HEADS).to(tl.int64), r_R % HEADS
    from_RD = (t_R * row_stride + head_R * head_stride)[:, None] + d_D[None, :]
    if part == 0:
        first, second = tl.load(q + from_RD, mask=real), tl.load(q + from_RD + HALF, mask=real)
    elif part == 1:
        first, second = tl.load(k + from_RD, mask=real), tl.load(k + from_RD + HALF, mask=real)
    else:
        first, second = tl.load(v + from_RD, mask=real), tl.load(v + from_RD + HALF, mask=real)
    first, second = first.to(tl.float32), second.to(tl.float32)
    turned = real & (part < 2)
    angle_RD = t_R[:, None] * (2 * HALF) + d_D[None, :]
    cos_RD = tl.load(cos + angle_RD, mask=turned, other=1.0)
    sin_RD = tl.load(sin + angle_RD + HALF, mask=turned, other=0.0)
    if BACK:
        sin_RD = -sin_RD
    to_RD = ((t_R * 3 + part) * HEADS + head_R)[:, None] * (2 * HALF) + d_D[None, :]
    dtype = out.dtype.element_ty
    tl.store(out + to_RD, (first * cos_RD - second * sin_RD).to(dtype), mask=real)
    tl.store(out + to_RD + HALF, (second * cos_RD + first * sin_RD).to(dtype), mask=real)


@triton.jit
def geglu(x, out, half, TILE: tl.constexpr):
    """gelu(first half of a row) * second half."""
    t = tl.program_id(0).to(tl.int64)
    i_I = tl.program_id(1) * TILE + tl.arange(0, TILE)
    real = i_I < half
    in_I = tl.load(x + t * 2 * half + i_I, mask=real, other=0.0).to(tl.float32)
    gate_I = tl.load(x + t * 2 * half + half + i_I, mask=real, other=0.0).to(tl.float32)
    tl.store(out + t * half + i_I, (activate(in_I, "gelu") * gate_I).to(out.dtype.element_ty), mask=real)


@triton.jit
def geglu_backward(x, grad, out, half, TILE: tl.constexpr):
    """Gradients of both halves of a row."""
    t = tl.program_id(0).to(tl.int64)
    i_I = tl.program_id(1) * TILE + tl.arange(0, TILE)
    real = i_I < half
    in_I = tl.load(x + t * 2 * half + i_I, mask=real, other=0.0).to(tl.float32)
    gate_I = tl.load(x + t * 2 * half + half + i_I, mask=real, other=0.0).to(tl.float32)
    grad_I = tl.load(grad + t * half + i_I, mask=real, other=0.0).to(tl.float32)
    below = 0.5 * (1 + tl.erf(in_I * 0.7071067811865476))
    slope = below + in_I * 0.3989422804014327 * tl.exp(-0.5 * in_I * in_I)
    dtype = out.dtype.element_ty
    tl.store(out + t * 2 * half + i_I, (grad_I * gate_I * slope).to(dtype), mask=real)
    tl.store(out + t * 2 * half + half + i_I, (grad_I * in_I * below).to(dtype), mask=real)


@triton.jit
def cross_entropy(logits, labels, losses, totals, V, row_stride, ignored, TILE: tl.constexpr):
    """-log softmax of a row at its label, 0 where it is ignored; and the logarithm of what softmax divides by."""
    t = tl.program_id(0).to(tl.int64)
    v_V = tl.arange(0, TILE)
    row = logits + t * row_stride
    most_V = tl.full((TILE,), -3e38, tl.float32)  # a number: what is infinite already has no difference
    sum_V = tl.zeros((TILE,), tl.float32)
    for start in range(0, V, TILE):  # each lane by itself; they meet at the end
        x_V = tl.load(row + start + v_V, mask=v_V < V - start, other=float("-inf")).to(tl.float32)
        higher_V = tl.maximum(most_V, x_V)
        sum_V = sum_V * tl.exp(most_V - higher_V) + tl.exp(x_V - higher_V)
        most_V = higher_V
    most = tl.max(most_V, 0)
    total = most + tl.log(tl.sum(sum_V * tl.exp(most_V - most), 0))
    label = tl.load(labels + t)
    is_labelled = label != ignored
    truth = tl.load(row + label, mask=is_labelled, other=0.0).to(tl.float32)
    tl.store(losses + t, tl.where(is_labelled, total - truth, 0.0))
    tl.store(totals + t, total)


@triton.jit
def cross_entropy_backward(logits, labels, totals, grads, out, V, row_stride, ignored, TILE: tl.constexpr):
    """Gradients of a tile of a row's logits."""
    t = tl.program_id(0).to(tl.int64)
    v_V = tl.program_id(1) * TILE + tl.arange(0, TILE)
    label = tl.load(labels + t)
    x_V = tl.load(logits + t * row_stride + v_V, mask=v_V < V, other=float("-inf")).to(tl.float32)
    likely_V = tl.exp(x_V - tl.load(totals + t)) - tl.where(v_V == label, 1.0, 0.0)
    grad_V = tl.where(label != ignored, likely_V * tl.load(grads + t), 0.0)
    tl.store(out + t * V + v_V, grad_V.to(out.dtype.element_ty), mask=v_V < V)


@triton.jit
def attend_step(q, k, v, keys, values, rows, first, length, positions, key_positions, out, HEADS, left, scale,
                x_stride, WINDOW: tl.constexpr, D: tl.constexpr, FOLDED: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """One new token of a text, of one head: its key and value go into the cache, then it looks back at what is there.

    keys, values and key_positions each hold the address of a tensor, (R, H, D) of q's dtype and (R,) int64: caches
    move, and what a recorded launch reads does not. A text of length 0 is none.
    """
    n, h = tl.program_id(0), tl.program_id(1)
    length_n = tl.load(length + n)
    if length_n > 0:
        d_D = tl.arange(0, FOLDED)
        real_D = d_D < D
        at = n.to(tl.int64) * x_stride + h * D + d_D
        q_D = tl.load(q + at, mask=real_D, other=0.0)
        k_D, v_D = tl.load(k + at, mask=real_D, other=0.0), tl.load(v + at, mask=real_D, other=0.0)
        stored_k = tl.load(keys).to(tl.pointer_type(q.dtype.element_ty))
        stored_v = tl.load(values).to(tl.pointer_type(q.dtype.element_ty))
        mine = tl.load(rows + n)
        to_D = (mine * HEADS + h) * D + d_D
        tl.store(stored_k + to_D, k_D, mask=real_D)
        tl.store(stored_v + to_D, v_D, mask=real_D)
        begin = tl.load(first + n)
        if WINDOW:
            here = tl.load(positions + n)
            stored_at = tl.load(key_positions).to(tl.pointer_type(tl.int64))
        wide_q, wide_k, wide_v = q_D.to(tl.float32) * scale, k_D.to(tl.float32), v_D.to(tl.float32)
        # The token itself comes from registers: what other threads see of the write just made is undefined.
        most = tl.sum(wide_q * wide_k, 0)
        total = tl.sum(tl.where(d_D == 0, 1.0, 0.0), 0)
        sum_D = wide_v
        j_J = tl.arange(0, TILE)
        from_JD = j_J[:, None] * (HEADS * D) + d_D[None, :]
        stored_k += (begin * HEADS + h) * D
        stored_v += (begin * HEADS + h) * D
        if D % 8 == 0:  # whole pieces of 16 bytes, in memory that begins at one
            stored_k, stored_v = tl.multiple_of(stored_k, 16), tl.multiple_of(stored_v, 16)
        for start in range(0, length_n, TILE):
            seen_J = (j_J < length_n - start) & (j_J != mine - begin - start)
            if WINDOW:
                behind_J = here - tl.load(stored_at + begin + start + j_J, mask=seen_J, other=0)
                seen_J = seen_J & (behind_J >= 0) & (behind_J <= left)
            read = seen_J[:, None] & real_D[None, :]
            key_JD = tl.load(stored_k + from_JD, mask=read, other=0.0).to(tl.float32)
            score_J = tl.where(seen_J, tl.sum(key_JD * wide_q[None, :], 1), float("-inf"))
            higher = tl.maximum(most, tl.max(score_J, 0))
            weight_J = tl.exp(score_J - higher)
            shrink = tl.exp(most - higher)
            value_JD = tl.load(stored_v + from_JD, mask=read, other=0.0).to(tl.float32)
            stored_k += TILE * HEADS * D
            stored_v += TILE * HEADS * D
            sum_D = sum_D * shrink + tl.sum(weight_J[:, None] * value_JD, 0)
            total = total * shrink + tl.sum(weight_J, 0)
            most = higher
        tl.store(out + n.to(tl.int64) * HEADS * D + h * D + d_D, (sum_D / total).to(out.dtype.element_ty), mask=real_D)
