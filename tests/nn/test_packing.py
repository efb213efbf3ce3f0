import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modernbert.errors import InputError
from modernbert.nn.inputs import lengths_of
from modernbert.nn.packing import Packing

masks = st.integers(1, 5).flatmap(
    lambda s: st.lists(st.lists(st.booleans(), min_size=s, max_size=s), min_size=1, max_size=5)
)


@given(masks)
def test_unpad_and_repad_are_inverse_at_real_tokens(rows):
    mask = torch.tensor(rows)
    packing = Packing.from_mask(mask)
    grid = torch.randn(*mask.shape, 3)
    packed = packing.unpad(grid)
    assert torch.equal(packed, grid[mask])
    back = packing.repad(packed)
    assert torch.equal(back[mask], grid[mask])
    assert not back[~mask].any()


@given(masks)
def test_positions_count_from_the_first_real_token_and_keep_gaps(rows):
    packing = Packing.from_mask(torch.tensor(rows))
    expected, gaps = [], False
    for row in rows:
        columns = [i for i, real in enumerate(row) if real]
        expected += [c - columns[0] for c in columns]
        gaps |= bool(columns) and columns[-1] - columns[0] != len(columns) - 1
    assert packing.positions_T.tolist() == expected
    assert packing.gaps == gaps
    assert packing.lengths == tuple(sum(row) for row in rows)
    assert packing.text_T.tolist() == [i for i, row in enumerate(rows) for real in row if real]


@given(st.lists(st.integers(0, 9), max_size=8))
def test_cumulative_lengths_and_a_mask_pack_alike(lengths):
    width = max(lengths, default=0)
    mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None] if lengths else torch.zeros(0, 0).bool()
    a = Packing.from_mask(mask)
    cumulative = torch.tensor([0, *lengths]).cumsum(0)
    b = Packing.from_lengths(lengths_of(cumulative, sum(lengths)))
    assert a.lengths == b.lengths
    assert torch.equal(a.positions_T, b.positions_T)
    assert torch.equal(a.text_T, b.text_T)
    assert b.cu_seqlens.tolist() == cumulative.tolist()
    assert b.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize(
    ("starts", "tokens"), [([0, 3], 4), ([1, 4], 4), ([0, 3, 2, 4], 4), ([], 0), ([[0, 4]], 4), ([0.0, 4.0], 4)]
)
def test_impossible_cumulative_lengths_are_refused(starts, tokens):
    with pytest.raises(InputError, match="cu_seqlens"):
        lengths_of(torch.tensor(starts), tokens)
