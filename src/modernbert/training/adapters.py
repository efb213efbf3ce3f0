"""Low-rank adapters by the PEFT library: small matrices that are trained instead of the weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from modernbert.errors import InputError
from modernbert.io.files import replacing, write_text
from modernbert.io.hub import ADAPTER, read_object
from modernbert.models.adapters import WEIGHTS
from modernbert.models.sentence_encoder import SentenceEncoder
from modernbert.retrieval.sparse import SparseEncoder

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
    _peft().set_peft_model_state_dict(model, load_file(folder / WEIGHTS))


def complete(folder: Path, model: Any) -> None:
    """Write beside what PEFT saved what makes the folder speak for itself, from the merged model.

    That is the configuration with the head and its labels; of an encoder of texts the layout of sentence-transformers,
    whose first part the adapter then is, by the names that its tensors have there; of a sparse encoder's model its own.
    """
    if not isinstance(model, SentenceEncoder | SparseEncoder):
        model.config_to_save().save_pretrained(folder)
        return
    path, own = folder / WEIGHTS, "base_model.model.model."
    kept = {n.replace(own, "base_model.model.", 1): t for n, t in load_file(path).items() if n.startswith(own)}
    with replacing(path) as temporary:
        save_file(kept, temporary, metadata={"format": "pt"})
    config = read_object(folder / ADAPTER)
    config |= {"modules_to_save": None, "base_model_name_or_path": model.model.name_or_path or None}
    write_text(folder / ADAPTER, json.dumps(config, indent=2) + "\n")
    if isinstance(model, SparseEncoder):
        model.model.config_to_save().save_pretrained(folder)
    else:
        model.save_layout(folder)


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
