"""Where the kernels run: on a card where there is one, else in Triton's interpreter."""

import numpy as np
import pytest
import torch

from modernbert.engines.gpu import operations


@pytest.fixture
def place(monkeypatch):
    """The device that the kernels serve in a test."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    from triton.runtime import interpreter

    def dot(self, a, b, total, *options):
        # NumPy's float32 products give a row other bits at another place of a block, on some processors.
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(total.data.dtype)
        return interpreter.TensorHandle(product + total.data, total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(operations, "interpreted", True)
    return torch.device("cpu")
