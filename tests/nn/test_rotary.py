import math

import torch

from modernbert.nn.rotary import apply_rope, rope_tables


def test_a_rotation_of_pairs_of_halves():
    """Dimension i and i + D/2 turn together by position * theta**(-2i/D)."""
    x = torch.randn(5, 2, 8)
    positions = torch.tensor([0, 1, 2, 7, 100])
    cos, sin = rope_tables({"rope_type": "default", "rope_theta": 50.0}, 8, positions, max_positions=10)
    out = apply_rope(x, cos, sin)
    for t, position in enumerate(positions.tolist()):
        for i in range(4):
            angle = position * 50.0 ** (-2 * i / 8)
            a, b = x[t, :, i], x[t, :, i + 4]
            torch.testing.assert_close(out[t, :, i], a * math.cos(angle) - b * math.sin(angle), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                out[t, :, i + 4], b * math.cos(angle) + a * math.sin(angle), rtol=1e-4, atol=1e-5
            )


def test_scores_depend_on_distance_alone():
    q, k = torch.randn(1, 1, 32), torch.randn(1, 1, 32)

    def score(m, n):
        rope = {"rope_type": "default", "rope_theta": 10_000.0}
        tables = [rope_tables(rope, 32, torch.tensor([p]), max_positions=512) for p in (m, n)]
        return (apply_rope(q, *tables[0]) * apply_rope(k, *tables[1])).sum().item()

    assert abs(score(3, 10) - score(103, 110)) < 1e-4


def test_dynamic_stretches_each_text_by_its_own_length():
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    text = torch.tensor([0] * 5 + [1] * 40)
    positions = torch.cat([torch.arange(5), torch.arange(40)])
    cos, _ = rope_tables(rope, 8, positions, max_positions=10, text_T=text)
    plain, _ = rope_tables({**rope, "rope_type": "default"}, 8, positions, max_positions=10)
    alone, _ = rope_tables(rope, 8, positions[5:], max_positions=10)
    assert torch.equal(cos[:5], plain[:5])
    assert torch.equal(cos[5:], alone)
    assert not torch.allclose(cos[5:], plain[5:])


def test_half_precision_is_rotated_in_float32():
    x = torch.randn(4, 2, 16).bfloat16()
    cos, sin = rope_tables({"rope_type": "default", "rope_theta": 1e4}, 16, torch.arange(4), max_positions=8)
    assert torch.equal(apply_rope(x, cos, sin), apply_rope(x.float(), cos, sin).bfloat16())
