"""Answers of a pipeline beside those of transformers."""

import numpy as np


def close(ours, theirs):
    """Equal in everything but the last digits of scores."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            close(ours[key], value)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            close(a, b)
    elif isinstance(theirs, float | np.floating):
        assert isinstance(ours, float)
        assert abs(ours - theirs) < 1e-5
    else:
        assert ours == theirs
