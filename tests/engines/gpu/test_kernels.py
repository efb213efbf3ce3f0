"""The kernels against what they stand for, written out in PyTorch, on random shapes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modernbert.engines.gpu import operations as gpu
from modernbert.engines.weights import Norm
from modernbert.nn.activations import activation as function_of
from modernbert.nn.attention.eager import EagerAttention
from modernbert.nn.packing import Packing
from modernbert.nn.rotary import rope_tables, split_rotated

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # and how far results may be off, relatively
SHAPES = [(1, 16, 16), (5, 48, 24), (33, 40, 100), (64, 96, 33), (70, 33, 64)]  # rows, inputs, outputs


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=["pointers", "descriptors"])
def reading(request, monkeypatch):
    """How products read: a card does it in its own way, the interpreter in both."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(gpu, "_copies", lambda device: request.param == "descriptors")
    gpu._launch.cache_clear()
    yield
    gpu._launch.cache_clear()


def numbers(place, dtype, *shape):
    return torch.randn(*shape).to(place, dtype)


def close(got, wanted, dtype):
    assert got.dtype == dtype
    scale = wanted.abs().max().item() + 1e-6
    torch.testing.assert_close(got.float(), wanted.float(), rtol=0, atol=DTYPES[dtype] * scale)


def plain(x, weight, bias):
    """The product in float64, of the numbers as they are."""
    out = x.double() @ weight.double().mT
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_products(place, reading, dtype, shape, bias):
    rows, inputs, outputs = shape
    x, weight = numbers(place, dtype, rows, inputs), numbers(place, dtype, outputs, inputs)
    b = numbers(place, dtype, outputs) if bias else None
    wanted = plain(x, weight, b)
    close(gpu.product(x, weight, b), wanted, dtype)
    before = numbers(place, dtype, rows, outputs)
    out = before.clone()
    assert gpu.product(x, weight, b, activation="relu", add_to=out) is out
    close(out, before.double() + wanted.relu(), dtype)


@pytest.mark.parametrize("name", gpu.ACTIVATIONS)
def test_activations_and_gates(place, reading, dtype, name):
    x, weight, bias = (numbers(place, dtype, *shape) for shape in ((19, 32), (60, 32), (60,)))
    function = function_of(name)
    first, second = plain(x, weight, bias).chunk(2, dim=-1)
    close(gpu.gated_product(x, weight, bias, name), function(first.float()).double() * second, dtype)
    close(gpu.product(x, weight, bias, activation=name), function(plain(x, weight, bias).float()), dtype)


def test_a_row_is_the_same_whatever_the_number_of_rows(place, reading, dtype):
    x, weight = numbers(place, dtype, 70, 48), numbers(place, dtype, 96, 48)
    cos, sin = (t.to(place) for t in rope_tables({"rope_type": "default", "rope_theta": 1e4}, 16, torch.arange(70),
                                                 max_positions=100))  # fmt: skip
    whole = gpu.product(x, weight)
    gated = gpu.gated_product(x, weight, None, "gelu")
    rotated = gpu.rotated_product(x, weight, None, cos, sin)
    for rows in (slice(0, 1), slice(3, 20), slice(33, 70)):
        assert torch.equal(gpu.product(x[rows], weight), whole[rows])
        assert torch.equal(gpu.gated_product(x[rows], weight, None, "gelu"), gated[rows])
        alone = gpu.rotated_product(x[rows], weight, None, cos[rows].contiguous(), sin[rows].contiguous())
        assert torch.equal(alone, rotated[rows])


@pytest.mark.parametrize("size", [8, 16, 24, 64, 80])
def test_rotation_in_the_product_is_rotation_after_it(place, reading, dtype, size):
    heads, rows = 3, 37
    x, weight = numbers(place, dtype, rows, 48), numbers(place, dtype, 3 * heads * size, 48) / 7
    bias = numbers(place, dtype, 3 * heads * size)
    positions = torch.randint(0, 500, (rows,))
    tables = rope_tables({"rope_type": "default", "rope_theta": 1e4}, size, positions, max_positions=500)
    cos, sin = (table.to(place) for table in tables)
    after = split_rotated(gpu.product(x, weight, bias).view(rows, 3, heads, size), cos, sin)
    got = gpu.rotated_product(x, weight, bias, cos, sin)
    if dtype == torch.float32:  # a multiplication and an addition may be one instruction here and two there
        close(got, torch.stack(after, 1), dtype)
    else:
        torch.testing.assert_close(got, torch.stack(after, 1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("size", [16, 24])
def test_rotation_and_its_gradient(place, size, monkeypatch):
    rows, heads = 21, 2
    qkv = torch.randn(rows, 3, heads, size, device=place)
    tables = rope_tables({"rope_type": "default", "rope_theta": 1e4}, size, torch.arange(rows), max_positions=500)
    cos, sin = (table.to(place) for table in tables)
    weights = [torch.randn(rows, heads, size, device=place) for _ in range(3)]
    found = []
    for serving in (True, False):
        monkeypatch.setattr(gpu, "serving", lambda dtype, device, serving=serving: serving)
        given = qkv.clone().requires_grad_()
        outs = split_rotated(given, cos, sin)
        sum((out * w).sum() for out, w in zip(outs, weights, strict=True)).backward()
        found.append((*outs, given.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def of(module):
    """The numbers of a LayerNorm."""
    return Norm.of(module)


@pytest.mark.parametrize("width", [16, 40, 129])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm(place, dtype, width, bias):
    norm = nn.LayerNorm(width, bias=bias, device=place, dtype=dtype)
    nn.init.normal_(norm.weight)
    if bias:
        nn.init.normal_(norm.bias)
    x = numbers(place, dtype, 9, width) * 3 + 1
    ids = torch.tensor([4, 0, 4, 8], device=place)
    wanted = F.layer_norm(x.double(), (width,), norm.weight.double(), None if not bias else norm.bias.double(), 1e-5)
    close(gpu.normalize(x, of(norm)), wanted, dtype)
    close(gpu.normalize(x, of(norm), ids), wanted[ids], dtype)


def test_geglu_and_its_gradients(place, dtype):
    x = numbers(place, dtype, 7, 2 * 1500)
    wide = x.double().requires_grad_()
    first, second = wide.chunk(2, dim=-1)
    wanted, grad = F.gelu(first) * second, numbers(place, dtype, 7, 1500)
    (wanted_grad,) = torch.autograd.grad(wanted, wide, grad.double())
    given = x.clone().requires_grad_()
    got = gpu.geglu(given)
    close(got, wanted, dtype)
    close(torch.autograd.grad(got, given, grad)[0], wanted_grad, dtype)


@pytest.mark.parametrize("vocabulary", [3, 40, 5000])
def test_cross_entropy_and_its_gradients(place, dtype, vocabulary):
    logits = numbers(place, dtype, 6, vocabulary) * 5
    logits[1, 0] = float("-inf")
    logits[2] += 80  # whose exponentials a float32 does not hold
    labels = torch.tensor([1, 2, 0, -100, vocabulary - 1, 1], device=place)
    wide, weights = logits.double().requires_grad_(), torch.rand(6, device=place)
    wanted = F.cross_entropy(wide, labels, reduction="none")
    (wanted_grad,) = torch.autograd.grad((wanted * weights).sum(), wide)
    given = logits.clone().requires_grad_()
    got = gpu.cross_entropy(given, labels, -100)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    close(torch.autograd.grad((got * weights).sum(), given)[0], wanted_grad, dtype)
    assert gpu.cross_entropy(logits[:0], labels[:0], -100).shape == (0,)


@pytest.mark.parametrize("left", [None, 5])
def test_a_step_looks_back_at_the_cache(place, dtype, left):
    """Four texts: regions that are full, half full, a ring that has gone round, and one that is none."""
    heads, size, generator = 2, 24, torch.Generator().manual_seed(3)
    past = [70, 3, 19, 0]  # tokens of each before this one
    firsts, room = [0, 90, 120, 0], 150
    rows = [firsts[i] + (past[i] if left is None or i != 2 else past[i] % 8) for i in range(4)]
    lengths = [past[0] + 1, past[1] + 1, past[2] + 1 if left is None else 8, 0]
    key_positions = torch.full((room,), -(2**40))
    keys, values = (torch.randn(room, heads, size, generator=generator).to(place, dtype) for _ in range(2))
    for text in range(3):
        for token in range(past[text] + 1):
            key_positions[firsts[text] + (token if left is None or text != 2 else token % 8)] = token
    qkv = torch.randn(4, 3, heads, size, generator=generator).to(place, dtype)
    stored, key_positions = [keys.clone(), values.clone()], key_positions.to(place)
    look = gpu.Look(
        *(torch.tensor(x, device=place) for x in (rows, firsts, lengths, past)),
        torch.tensor([key_positions.data_ptr()], device=place),
        left,
    )
    addresses = [torch.tensor([x.data_ptr()], device=place) for x in stored]
    out = gpu.attend_step(qkv, look, *addresses)
    for text in range(3):
        seen = [
            row
            for row in range(firsts[text], firsts[text] + lengths[text])
            if left is None or 0 <= past[text] - int(key_positions[row]) <= left
        ]
        assert rows[text] in seen
        keys[rows[text]], values[rows[text]] = qkv[text, 1], qkv[text, 2]
        scores = torch.einsum("hd,khd->hk", qkv[text, 0].double(), keys[seen].double()) / math.sqrt(size)
        close(out[text], torch.einsum("hk,khd->hd", scores.softmax(-1), values[seen].double()), dtype)
    assert torch.equal(stored[0], keys)
    assert torch.equal(stored[1], values)


def test_nothing_in_nothing_out(place):
    weight = torch.randn(96, 32, device=place)
    none = torch.empty(0, 32, device=place)
    table = torch.empty(0, 1, 16, device=place)
    assert gpu.product(none, weight).shape == (0, 96)
    assert gpu.gated_product(none, weight, None, "gelu").shape == (0, 48)
    assert gpu.rotated_product(none, weight, None, table, table).shape == (0, 3, 2, 16)
    assert gpu.normalize(none, of(nn.LayerNorm(32, device=place))).shape == (0, 32)
    assert gpu.geglu(none).shape == (0, 16)


@pytest.mark.parametrize("memory", [227, 99, 64])
def test_tiles_follow_the_card_and_sum_in_one_order(memory):
    chosen = gpu.tiles(torch.bfloat16, memory * 1024)
    assert len({tile.inputs for tile in chosen}) == 1
    assert chosen[0].outputs == (256 if memory == 227 else 128)
    for tile in chosen:
        assert tile.stages * tile.inputs * (tile.rows + tile.outputs) * 2 <= memory * 1024, tile


@pytest.mark.parametrize("size", [16, 24, 64])
@pytest.mark.parametrize("window", [(5, 5), (7, 0), (64, 64), (200, 130)], ids=str)
def test_attention_to_near_tokens(place, dtype, size, window):
    lengths = [1, 300, 0, 128, 70]
    packing = Packing.from_lengths(lengths, place)
    qkv = numbers(place, dtype, packing.tokens, 3, 2, size)
    got = gpu.attend_window(qkv, packing.cu_seqlens, max(lengths), window)
    plan = EagerAttention().plan(packing, window, torch.float64)
    close(got, EagerAttention().attend(*qkv.double().unbind(1), plan), dtype)
    for start, end in packing.spans:
        starts = torch.tensor([0, end - start], dtype=torch.int32, device=place)
        assert torch.equal(gpu.attend_window(qkv[start:end], starts, 512, window), got[start:end])


def test_they_serve_where_they_can(monkeypatch):
    monkeypatch.setattr(gpu, "interpreted", False)
    assert not gpu.serving(torch.float32, torch.device("cpu"))
    assert not gpu.serving(torch.float64, torch.device("cuda"))
    assert not gpu.serving(torch.float32, torch.device("meta"))


def test_the_oracle_of_the_steps_is_that_of_all_attention(place):
    """One text's last token, by the kernel and by eager attention over the whole text."""
    packing, generator = Packing.from_lengths([40]), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(40, 2, 16, generator=generator) for _ in range(3))
    wanted = EagerAttention().attend(q, k, v, EagerAttention().plan(packing, (7, 0), q.dtype))[-1]
    positions = torch.arange(40, device=place)
    keys, values = k.to(place).clone(), v.to(place).clone()
    keys[39] = values[39] = 0
    one = torch.tensor([39], device=place)
    look = gpu.Look(one, one - 39, one + 1, one, torch.tensor([positions.data_ptr()], device=place), 7)
    qkv = torch.stack((q[-1], k[-1], v[-1]))[None].to(place)
    out = gpu.attend_step(qkv, look, *(torch.tensor([x.data_ptr()], device=place) for x in (keys, values)))
    torch.testing.assert_close(out[0].cpu(), wanted, rtol=0, atol=1e-5)
