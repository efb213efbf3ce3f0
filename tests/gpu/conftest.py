"""Where the kernels run: on a card where there is one, else in Triton's interpreter."""

import pytest
import torch

from modernbert.gpu import operations


@pytest.fixture
def place(monkeypatch):
    """The device that the kernels serve in a test."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    monkeypatch.setattr(operations, "interpreted", True)
    return torch.device("cpu")
