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
def _tile(T, outputs, TILE_T: tl.constexpr, TILE_O: tl.constexpr, GROUP: tl.constexpr):
    """Which tile a program computes. Tiles of GROUP rows of tiles run together, so that they share what is cached."""
    program = tl.program_id(0)
    wide = tl.cdiv(outputs, TILE_O)
    of_group = GROUP * wide
    first = program // of_group * GROUP
    high = min(tl.cdiv(T, TILE_T) - first, GROUP)
    within = program % of_group
    return first + within % high, within // high


@triton.jit
def _row_dot(x, weight, T, inputs, t_T, out_1, out_2, x_stride,
             PAIRED: tl.constexpr, TILE_T: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr,
             EVEN_I: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    """Sums of rows times outputs of a weight, in steps of TILE_I; those of two sets of outputs at once where PAIRED.

    x is where the first of the tile's T rows is.
    """
    i_I = tl.arange(0, TILE_I)
    x_TI = x + t_T[:, None] * x_stride + i_I[None, :]
    in_T = (t_T < T)[:, None]
    first_IO = weight + out_1[None, :] * inputs + i_I[:, None]
    second_IO = weight + out_2[None, :] * inputs + i_I[:, None]
    sum_1 = tl.zeros((TILE_T, TILE_O), tl.float32)
    sum_2 = tl.zeros((TILE_T, TILE_O), tl.float32)
    for start in range(0, inputs, TILE_I):
        if EVEN_I:
            a_TI = tl.load(x_TI, mask=in_T, other=0.0)
            b_IO = tl.load(first_IO)
        else:
            left = i_I < inputs - start
            a_TI = tl.load(x_TI, mask=in_T & left[None, :], other=0.0)
            b_IO = tl.load(first_IO, mask=left[:, None], other=0.0)
        if WIDEN:
            a_TI, b_IO = a_TI.to(tl.float32), b_IO.to(tl.float32)
        sum_1 = tl.dot(a_TI, b_IO, sum_1, input_precision="ieee")
        if PAIRED:
            c_IO = tl.load(second_IO) if EVEN_I else tl.load(second_IO, mask=left[:, None], other=0.0)
            if WIDEN:
                c_IO = c_IO.to(tl.float32)
            sum_2 = tl.dot(a_TI, c_IO, sum_2, input_precision="ieee")
            second_IO += TILE_I
        x_TI += TILE_I
        first_IO += TILE_I
    return sum_1, sum_2


@triton.jit(do_not_specialize=["T"])
def product(x, weight, bias, out, T, inputs, outputs, x_stride, out_stride,
            BIAS: tl.constexpr, ACTIVATION: tl.constexpr, ADD: tl.constexpr, EVEN_I: tl.constexpr,
            WIDEN: tl.constexpr, TILE_T: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr,
            GROUP: tl.constexpr):  # fmt: skip
    """out = activation(x @ weight.T + bias), or what out was plus that."""
    row, column = _tile(T, outputs, TILE_T, TILE_O, GROUP)
    start, t_T = row.to(tl.int64) * TILE_T, tl.arange(0, TILE_T)
    o_O = column * TILE_O + tl.arange(0, TILE_O)
    read_O = tl.where(o_O < outputs, o_O, 0)  # columns past the end are computed from the first one, and not written
    sum_TO, _ = _row_dot(x + start * x_stride, weight, T - start, inputs, t_T, read_O, read_O, x_stride,
                         False, TILE_T, TILE_O, TILE_I, EVEN_I, WIDEN)  # fmt: skip
    if BIAS:
        sum_TO += tl.load(bias + read_O).to(tl.float32)[None, :]
    sum_TO = activate(sum_TO, ACTIVATION)
    out_TO = out + start * out_stride + t_T[:, None] * out_stride + o_O[None, :]
    written = (t_T < T - start)[:, None] & (o_O < outputs)[None, :]
    if ADD:
        sum_TO += tl.load(out_TO, mask=written, other=0.0).to(tl.float32)
    tl.store(out_TO, sum_TO.to(out.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["T"])
def gated_product(x, weight, bias, out, T, inputs, P, x_stride, out_stride,
                  BIAS: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_I: tl.constexpr, WIDEN: tl.constexpr,
                  TILE_T: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """out = activation(first P outputs) * other P outputs, of x @ weight.T + bias."""
    row, column = _tile(T, P, TILE_T, TILE_O, GROUP)
    start, t_T = row.to(tl.int64) * TILE_T, tl.arange(0, TILE_T)
    p_P = column * TILE_O + tl.arange(0, TILE_O)
    read_P = tl.where(p_P < P, p_P, 0)
    in_TP, gate_TP = _row_dot(x + start * x_stride, weight, T - start, inputs, t_T, read_P, P + read_P, x_stride,
                              True, TILE_T, TILE_O, TILE_I, EVEN_I, WIDEN)  # fmt: skip
    if BIAS:
        in_TP += tl.load(bias + read_P).to(tl.float32)[None, :]
        gate_TP += tl.load(bias + P + read_P).to(tl.float32)[None, :]
    out_TP = out + start * out_stride + t_T[:, None] * out_stride + p_P[None, :]
    written = (t_T < T - start)[:, None] & (p_P < P)[None, :]
    tl.store(out_TP, (activate(in_TP, ACTIVATION) * gate_TP).to(out.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["T"])
def rotated_product(x, weight, bias, out, cos, sin, T, inputs, P, ROTATED, x_stride, out_stride,
                    HALF: tl.constexpr, BIAS: tl.constexpr, EVEN_I: tl.constexpr, WIDEN: tl.constexpr,
                    TILE_T: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Queries, keys and values of rows. Of each head's HALF pairs of columns, those before pair ROTATED are turned.

    cos and sin are (T, 2 * HALF), the sines signed as `nn.rotary.rope_tables` makes them.
    """
    row, column = _tile(T, P, TILE_T, TILE_O, GROUP)
    start, t_T = row.to(tl.int64) * TILE_T, tl.arange(0, TILE_T)
    p_P = column * TILE_O + tl.arange(0, TILE_O)
    read_P = tl.where(p_P < P, p_P, 0)
    first_P = read_P // HALF * (2 * HALF) + read_P % HALF
    first_TP, second_TP = _row_dot(x + start * x_stride, weight, T - start, inputs, t_T, first_P, first_P + HALF,
                                   x_stride, True, TILE_T, TILE_O, TILE_I, EVEN_I, WIDEN)  # fmt: skip
    if BIAS:
        first_TP += tl.load(bias + first_P).to(tl.float32)[None, :]
        second_TP += tl.load(bias + first_P + HALF).to(tl.float32)[None, :]
    # What is rotated is what a product by itself would have stored.
    dtype = out.dtype.element_ty
    first_TP, second_TP = first_TP.to(dtype), second_TP.to(dtype)
    d_D = tl.arange(0, HALF)
    angle_TD = t_T[:, None] * (2 * HALF) + d_D[None, :]
    in_T = (t_T < T - start)[:, None]
    cos_TD = tl.load(cos + start * (2 * HALF) + angle_TD, mask=in_T, other=1.0)
    sin_TD = tl.load(sin + start * (2 * HALF) + HALF + angle_TD, mask=in_T, other=0.0)
    h_H = column * (TILE_O // HALF) + tl.arange(0, TILE_O // HALF)
    turned = (h_H < ROTATED // HALF)[None, :, None]
    cos_THD = tl.where(turned, cos_TD[:, None, :], 1.0)
    sin_THD = tl.where(turned, sin_TD[:, None, :], 0.0)
    first_THD = tl.reshape(first_TP, (TILE_T, TILE_O // HALF, HALF))
    second_THD = tl.reshape(second_TP, (TILE_T, TILE_O // HALF, HALF))
    left_TP = tl.reshape(first_THD * cos_THD - second_THD * sin_THD, (TILE_T, TILE_O))
    right_TP = tl.reshape(second_THD * cos_THD + first_THD * sin_THD, (TILE_T, TILE_O))
    written = in_T & (p_P < P)[None, :]
    out_TP = out + start * out_stride + t_T[:, None] * out_stride + first_P[None, :]
    tl.store(out_TP, left_TP.to(dtype), mask=written)
    tl.store(out_TP + HALF, right_TP.to(dtype), mask=written)


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
