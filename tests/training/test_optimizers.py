"""Optimizers, and their groups of parameters."""

import pytest
import torch

from modernbert.training.optimizers import StableAdamW, orthogonalize, parameter_groups


def test_stable_adamw_is_adamw_where_gradients_hold_no_surprise():
    a = torch.randn(5, 4, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    ours = StableAdamW([a], lr=0.01, betas=(0.9, 0.999), eps=1e-12, weight_decay=0.1)
    theirs = torch.optim.AdamW([b], lr=0.01, betas=(0.9, 0.999), eps=1e-12, weight_decay=0.1)
    gradient = torch.randn(5, 4)
    for _ in range(5):
        a.grad, b.grad = gradient.clone(), gradient.clone()  # the same again: rms(gradient / sqrt(variance)) is 1
        ours.step()
        theirs.step()
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    before = a.detach().clone()
    a.grad = gradient * 1000
    ours.step()
    assert (a - before).abs().max() < 0.01  # a surprise shrinks the step
    with pytest.raises(ValueError, match="must not be negative"):
        StableAdamW([a], lr=-1)


def test_orthogonal_updates():
    for shape in ((8, 8), (20, 6), (3, 5, 12)):
        out = orthogonalize(torch.randn(*shape))
        assert out.shape == shape
        values = torch.linalg.svdvals(out)
        assert ((values > 0.5) & (values < 1.4)).all()


def test_groups_hold_every_parameter_once(small_model):
    groups = parameter_groups(small_model, 0.1)
    counted = [id(p) for g in groups for p in g["params"]]
    assert sorted(counted) == sorted(id(p) for p in small_model.parameters())
    by_id = {id(p): n for n, p in small_model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            assert (group["weight_decay"] == 0) == (parameter.dim() == 1)
            assert group.get("orthogonal", False) == (".layers." in by_id[id(parameter)] and parameter.dim() == 2)
            assert (group.get("parts") == 3) == ("Wqkv" in by_id[id(parameter)])
