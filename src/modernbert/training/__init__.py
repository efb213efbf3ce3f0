"""Training: runs of fine-tuning and pretraining, and their parts for loops of one's own.

Names are imported when they are first used.
"""

from __future__ import annotations

from modernbert.lazy import exports

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
    "mine": "training.mining",
    "make_schedule": "training.schedules",
    "pack_rows": "training.examples",
    "parameter_groups": "training.optimizers",
    "prepare_data": "training.pretraining.prepare",
    "pretrain": "training.pretraining.run",
    "train_tokenizer": "training.pretraining.train_tokenizer",
}
__getattr__, __dir__ = exports(__name__, _EXPORTS)
__all__ = __dir__()
