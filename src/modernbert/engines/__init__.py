"""Engines: who runs a frozen model, C kernels on a CPU and Triton kernels on a card; `freeze` is their contract.

Importing this makes known to `nn` what they bring: attention backends, and kernels for some of its functions.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from modernbert.engines.gpu import operations
from modernbert.nn.attention import AttentionBackend, register_backend, register_choice
from modernbert.nn.dispatch import register_kernel


def _choose_on_card(dtype: torch.dtype) -> tuple[str, str]:
    """The fastest backend that is exact for numbers of a dtype on a card, and why it is that one."""
    from modernbert.engines.gpu import flash, flex

    name = str(dtype).removeprefix("torch.")
    if dtype not in (torch.float16, torch.bfloat16):
        return "sdpa", f"flash attention has no {name}"
    without_flash = flash.why_not()
    if not without_flash:
        return "flash_attention_2", f"on cuda, {name}"
    if torch.version.hip is not None and not flex.why_not():
        return "flex_attention", f"flash attention: {without_flash}"
    return "sdpa", f"flash attention: {without_flash}"


def _register(name: str, file: str, backend: str) -> None:
    """Have a backend made of a class whose file is imported when it is first asked for."""

    def make(deterministic: bool) -> AttentionBackend:
        cls: Any = getattr(importlib.import_module(f"modernbert.engines.{file}"), backend)
        made: AttentionBackend = cls(deterministic)
        return made

    register_backend(name, make)


_register("native", "cpu.attention", "NativeAttention")
_register("flash_attention_2", "gpu.flash", "FlashAttention")
_register("flex_attention", "gpu.flex", "FlexAttention")
register_choice("cuda", _choose_on_card)


def _train_layer(layer: Any, x_TM: Tensor, shared: Any, rows: Tensor | None = None) -> Tensor | None:
    from modernbert.engines.cpu.training import train_layer

    return train_layer(layer, x_TM, shared, rows)


def _trains(dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cpu":
        return False
    from modernbert.engines.cpu.training import serves

    return serves(dtype, device)


register_kernel("layer", _trains, _train_layer)
for _kernel in (operations.rotate, operations.cross_entropy, operations.geglu):
    register_kernel(_kernel.__name__, operations.serving, _kernel)
