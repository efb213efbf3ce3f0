"""What this machine can do, and how near to it a model comes."""

from modernbert.tools.bench.measure import PARTS, Limits, Result, described, lengths_of, limits, measure, useful_flops
from modernbert.tools.bench.picture import draw

__all__ = ["PARTS", "Limits", "Result", "described", "draw", "lengths_of", "limits", "measure", "useful_flops"]
