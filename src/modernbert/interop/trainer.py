"""For `transformers.Trainer`, which of models that are not its own saves the weights alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from modernbert.models.base import PreTrainedModel


class CheckpointCallback:
    """Makes what `transformers.Trainer` saves of a model whole: `from_pretrained` loads every checkpoint.

    `Trainer(model, ..., callbacks=[CheckpointCallback(tokenizer)])` writes the configuration and the tokenizer into
    each checkpoint and, at the end of training, into `output_dir`, where `save_model()` writes the weights. From
    construction on, the model's state dict leaves out weights that are tied, which the trainer could not save;
    `load_state_dict` ties them again.

    Args:
        tokenizer: anything with `save_pretrained`, if the trainer itself has none (`processing_class`).
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Prepare the model for being saved."""
        if isinstance(model, PreTrainedModel):
            model.register_state_dict_post_hook(_leave_out_tied)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Complete the checkpoint of this step."""
        self._write(Path(args.output_dir) / f"checkpoint-{state.global_step}", state, model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Complete the folder of the run."""
        self._write(Path(args.output_dir), state, model)

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith("on_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return lambda *args, **kwargs: None  # the trainer's other events

    def _write(self, folder: Path, state: Any, model: Any) -> None:
        if not state.is_world_process_zero or not isinstance(model, PreTrainedModel):
            return  # what wraps a model, such as PEFT's adapters, saves itself
        model.config_to_save().save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def _leave_out_tied(model: nn.Module, weights: dict[str, Any], prefix: str, metadata: Any) -> None:
    assert isinstance(model, PreTrainedModel)
    if model.config.tie_word_embeddings:
        for name in model.tied_weights:
            weights.pop(prefix + name, None)
