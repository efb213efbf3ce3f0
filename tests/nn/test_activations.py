import itertools

import pytest
import torch
import torch.nn.functional as F

from modernbert import config
from modernbert.nn.activations import ACTIVATIONS, activation
from tests.conftest import threads

PEERS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def test_every_name_that_a_configuration_takes_is_here():
    assert set(ACTIVATIONS) == set(config.ACTIVATIONS) == set(PEERS)
    assert activation("gelu") is ACTIVATIONS["gelu"]
    assert activation(torch.neg) is torch.neg


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values(name):
    x = torch.linspace(-20, 20, 4001)
    torch.testing.assert_close(ACTIVATIONS[name](x), PEERS[name](x), rtol=1e-6, atol=1e-6)
    assert ACTIVATIONS[name](x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("number", [1, 2, 5, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("onednn", [True, False])
def test_a_row_is_the_same_whatever_the_number_of_rows(name, number, dtype, onednn):
    with threads(number, onednn):
        for width in (3, 16, 48, 97, 1152):
            x = (torch.randn(800, width) * 3).to(dtype)
            whole = ACTIVATIONS[name](x)
            for rows, start in itertools.product((1, 2, 17, 300, 777), (0, 7)):
                assert torch.equal(ACTIVATIONS[name](x[start : start + rows]), whole[start : start + rows])
