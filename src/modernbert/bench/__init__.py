"""What this machine can do, and how near to it a model comes."""

from modernbert.bench.measure import Limits, Result, lengths_of, limits, measure, useful_flops
from modernbert.bench.picture import draw

__all__ = ["Limits", "Result", "draw", "lengths_of", "limits", "measure", "useful_flops"]
