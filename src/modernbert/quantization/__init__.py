"""Quantization, from outside: it replaces modules, and says how its checkpoints load.

Importing this lets `from_pretrained` of every model read quantized checkpoints, and quantize.
"""

from modernbert.models.formats import register_format
from modernbert.quantization.format import Quantized


def register() -> None:
    """Have models read, quantize and save these checkpoints."""
    register_format(Quantized())


register()
