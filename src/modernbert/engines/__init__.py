"""Engines: who runs a frozen model, C kernels on a CPU and Triton kernels on a card; `freeze` is their contract.

Importing this makes known to `nn` what they bring: attention backends, and kernels for some of its functions.
"""

import torch

from modernbert.nn.attention import AttentionBackend, register_backend, register_choice
from modernbert.nn.dispatch import register_kernel


def _native(deterministic: bool) -> AttentionBackend:
    from modernbert.engines.cpu.attention import NativeAttention

    return NativeAttention(deterministic)


def _flash(deterministic: bool) -> AttentionBackend:
    from modernbert.engines.gpu.flash import FlashAttention

    return FlashAttention(deterministic)


def _flex(deterministic: bool) -> AttentionBackend:
    from modernbert.engines.gpu.flex import FlexAttention

    return FlexAttention(deterministic)


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


def _register() -> None:
    from modernbert.engines.gpu import operations

    for name, make in (("native", _native), ("flash_attention_2", _flash), ("flex_attention", _flex)):
        register_backend(name, make)
    register_choice("cuda", _choose_on_card)
    for name, kernel in (
        ("rotate", operations.rotate),
        ("cross_entropy", operations.cross_entropy),
        ("geglu", operations.geglu),
    ):
        register_kernel(name, operations.serving, kernel)


_register()
