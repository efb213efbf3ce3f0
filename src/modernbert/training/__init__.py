"""Training: runs of fine-tuning and pretraining, and their parts for loops of one's own.

Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "FinetuneOptions": "training.tasks.options",
    "Muon": "training.optimizers",
    "Objective": "training.contract",
    "PretrainOptions": "training.pretraining.options",
    "SentenceEmbedding": "training.tasks.sentence_embedding",
    "StableAdamW": "training.optimizers",
    "StepPlan": "training.examples",
    "TASKS": "training.tasks.catalog",
    "Task": "training.tasks.base",
    "TrainingOptions": "training.options",
    "by_tokens": "training.examples",
    "default_rate": "training.schedules",
    "denormals_flushed": "engines.cpu.library",
    "finetune": "training.finetuning",
    "fit": "training.engine",
    "make_schedule": "training.schedules",
    "pack_rows": "training.examples",
    "parameter_groups": "training.optimizers",
    "prepare_data": "training.pretraining.prepare",
    "pretrain": "training.pretraining.run",
    "train_tokenizer": "training.pretraining.train_tokenizer",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"modernbert.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
