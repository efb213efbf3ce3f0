"""Low-rank adapters by the PEFT library: small matrices that are trained instead of the weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from modernbert.errors import InputError

_TARGETS = ("Wqkv", "q_proj", "k_proj", "v_proj", "Wo", "Wi")
# Parts that are no head; an output layer that is tied is the embedding.
_BODY = ("model", "decoder", "embeddings", "layers", "final_norm")


def add_adapters(model: nn.Module, rank: int, alpha: float | None) -> Any:
    """A model whose layers have adapters; they and its head are trainable, and nothing else.

    Args:
        model: of any class of this package.
        rank: of the adapters.
        alpha: their outputs are scaled by alpha / rank; twice the rank where None.

    Raises:
        InputError: PEFT is not installed.
    """
    peft = _peft()
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    parts: list[str] = []
    for name, part in model.named_children():
        listed = [f"{name}.{i}" for i in range(len(part))] if isinstance(part, nn.ModuleList) else [name]
        parts += listed if name not in _BODY else []
    heads = [name for name in parts if any(True for _ in model.get_submodule(name).parameters())]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=sorted(names & set(_TARGETS)),
        modules_to_save=heads or None,
        bias="none",
    )
    with warnings.catch_warnings():
        # PEFT takes the prediction head of decoders for the tied output, by its name, "lm_head".
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True` and a tied layer")
        return peft.get_peft_model(model, config)


def has_adapters(model: Any) -> bool:
    return hasattr(model, "peft_config")


def load_adapters(model: Any, folder: Path) -> None:
    from safetensors.torch import load_file

    _peft().set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


def merged(model: Any) -> Any:
    """The model without adapters, their products added to its weights."""
    return model.merge_and_unload()


def _peft() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it imports
            import peft
    except ImportError as error:
        raise InputError("adapters need peft: pip install 'modernbert[lora]'") from error
    return peft
