"""Pretraining of an encoder or a decoder: packed batches, one process.

Everything that a run writes is safetensors and JSON, and a run goes on from its last checkpoint.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from modernbert.errors import DivergedError, InputError
from modernbert.hub import Source
from modernbert.models.masked_lm import ModernBertForMaskedLM
from modernbert.models.placement import resolve_device
from modernbert.native.library import denormals_flushed
from modernbert.training.checkpoints import (
    checkpoints,
    last_checkpoint,
    optimizer_state,
    read_state,
    restore_optimizer,
    write_checkpoint,
)
from modernbert.training.data import Corpus, token_batches
from modernbert.training.objectives import LanguageModel, MaskedLM, make_objective
from modernbert.training.optimizers import OPTIMIZERS, parameter_groups
from modernbert.training.precision import autocast
from modernbert.training.schedules import warmup_stable_decay
from modernbert.training.train_tokenizer import save_tokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PretrainOptions:
    """How to train.

    Args:
        steps: optimizer steps in all.
        tokens_per_step: tokens of a batch, special ones included.
        micro_tokens: tokens of a forward pass; a batch is a whole number of passes.
        optimizer: "stableadamw", or "muon" for the matrices inside the layers.
        lr: peak learning rate.
        weight_decay: decoupled weight decay.
        warmup: share of the steps in which the rate rises.
        decay: share of the steps, the last ones, in which it falls.
        objective: "mlm", masked language modelling of an encoder, or "clm", causal modelling with a decoder.
        mask_rate: share of the tokens to predict, of "mlm".
        max_grad_norm: gradients are scaled down to this norm.
        dtype: "auto" (bfloat16 where the device computes it natively, else float32), "bfloat16" or "float32".
        save_dtype: dtype of the finished model's weights on disk, such as "float16" to halve them.
        seed: of weights, order and masks.
        eval_every, save_every: steps between validations and between checkpoints.
    """

    objective: str = "mlm"
    steps: int = 1000
    tokens_per_step: int = 8192
    micro_tokens: int = 4096
    optimizer: str = "stableadamw"
    lr: float = 3e-3
    weight_decay: float = 0.1
    warmup: float = 0.02
    decay: float = 0.3
    mask_rate: float = 0.3
    max_grad_norm: float = 1.0
    dtype: str = "auto"
    save_dtype: str = "float32"
    seed: int = 0
    eval_every: int = 500
    save_every: int = 250

    def __post_init__(self) -> None:
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"mask_rate is {self.mask_rate}; it must lie between 0 and 1")
        for name in ("steps", "tokens_per_step", "micro_tokens", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {self.optimizer!r}; choose one of {', '.join(OPTIMIZERS)}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; choose auto, float32 or bfloat16")
        if self.tokens_per_step % self.micro_tokens:
            raise ValueError(
                f"tokens_per_step is {self.tokens_per_step}, no multiple of micro_tokens {self.micro_tokens}"
            )
        if self.save_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"save_dtype is {self.save_dtype!r}; choose float32, bfloat16 or float16")
        if not (self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1):
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} are shares of the steps, at most 1 together")


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a run says of itself after a step. Validation figures are None but after a validation."""

    step: int
    steps: int
    loss: float
    lr: float
    tokens: int
    tokens_per_second: float
    seconds_left: float
    val_loss: float | None = None
    val_accuracy: float | None = None


@denormals_flushed()
def pretrain(
    model: LanguageModel,
    train: Corpus,
    held_out: Corpus | None,
    output: str | Path,
    options: PretrainOptions,
    *,
    tokenizer: Tokenizer,
    report: Callable[[Progress], None] = lambda progress: None,
    resume: bool = False,
) -> LanguageModel:
    """Train a model in place, checkpoint it under `output`, and save it there at the end.

    Args:
        model: freshly initialised, or one to train further.
        train, held_out: tokenized texts; without held-out ones nothing is validated.
        output: folder of the run: `metrics.jsonl`, `checkpoint-STEP`, and the finished model.
        options: how to train.
        tokenizer: what the texts were tokenized with; it is saved beside the model.
        report: called after every step.
        resume: go on from the last checkpoint under `output`. The number of steps may differ from that run's.

    Returns:
        The model, in evaluation mode.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    objective = make_objective(options.objective, tokenizer, options.mask_rate)
    if not isinstance(model, objective.model_class):
        raise InputError(
            f"objective {options.objective!r} trains {objective.model_class.__name__}, not {type(model).__name__}"
        )
    own_config = model.config
    if isinstance(model, ModernBertForMaskedLM):
        model.config = model.config.replace(sparse_prediction=True)  # logits for labelled tokens only, while training
    model.train()
    optimizer = OPTIMIZERS[options.optimizer](parameter_groups(model, options.weight_decay), lr=options.lr)
    step = _restore(model, optimizer, output, options) if resume else 0
    if not resume and checkpoints(output):
        raise InputError(f"{output} holds checkpoints of an earlier run; resume it or choose another folder")
    passes = options.tokens_per_step // options.micro_tokens
    batches = token_batches(train, objective, options.micro_tokens, options.seed, start=step * passes)
    warmup, decay = round(options.warmup * options.steps), round(options.decay * options.steps)
    # Encoders are compared at the rate of BERT's papers, whatever rate they are trained at.
    validation = MaskedLM(tokenizer, 0.15) if options.objective == "mlm" else objective
    seen, began = 0, time.perf_counter()
    speed = 0.0
    while step < options.steps:
        started = time.perf_counter()
        factor = warmup_stable_decay(step, options.steps, warmup, decay)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * factor
        micro = [next(batches) for _ in range(passes)]
        labels = sum(int((b.labels != -100).sum()) for b in micro)
        loss = 0.0
        for batch in micro:
            with autocast(options.dtype, model.device):
                out: Any = model(
                    input_ids=batch.input_ids.to(model.device),
                    cu_seqlens=batch.cu_seqlens,
                    labels=batch.labels.to(model.device),
                    num_items_in_batch=labels,  # every label of the step weighs the same, whatever its pass
                )
            out.loss.backward()
            loss += float(out.loss.detach())
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {step}; lower the learning rate ({options.lr})")
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        tokens = sum(len(b.input_ids) for b in micro)
        seen += tokens
        now = tokens / (time.perf_counter() - started)
        speed = now if not speed else 0.95 * speed + 0.05 * now
        left = (options.steps - step) * (time.perf_counter() - began) / (seen / tokens)
        progress = Progress(step, options.steps, loss, options.lr * factor, seen, speed, left)
        last = step == options.steps
        if held_out is not None and len(held_out) and (step % options.eval_every == 0 or last):
            score = validation.evaluate(model, held_out, max_tokens=None if last else 100_000)
            progress = dataclasses.replace(progress, val_loss=score.loss, val_accuracy=score.top1)
        with (output / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(progress)) + "\n")
        report(progress)
        if step % options.save_every == 0 or last:
            _save(model, optimizer, output, step, options, own_config)
    model.config = own_config
    model.eval()
    copy.deepcopy(model).to(getattr(torch, options.save_dtype)).save_pretrained(output)
    save_tokenizer(objective.finish_tokenizer(tokenizer), output, model.config.max_position_embeddings)
    return model


def new_model(
    tokenizer: Tokenizer,
    changes: dict[str, Any],
    config: Path | None = None,
    device: Any = None,
    seed: int = 0,
    objective: str = "mlm",
) -> LanguageModel:
    """A freshly initialised model for a tokenizer.

    Args:
        tokenizer: gives the vocabulary's size and the special tokens' ids.
        changes: fields of the configuration that differ from its defaults.
        config: a JSON file, or a folder with `config.json`, to start from instead of the defaults.
        device: where the model goes.
        seed: of the weights.
        objective: what it is for: "mlm" makes an encoder, "clm" a decoder.
    """
    base: dict[str, Any] = {}
    if config is not None:
        path = config / "config.json" if config.is_dir() else config
        base = Source(path.parent).read_json(path.name)
    ids = {name: tokenizer.token_to_id(f"[{name.upper()}]") for name in ("cls", "sep", "pad")}
    special = {
        "pad_token_id": ids["pad"],
        "cls_token_id": ids["cls"],
        "bos_token_id": ids["cls"],
        "sep_token_id": ids["sep"],
        "eos_token_id": ids["sep"],
    }
    values = {**base, **changes, **special, "vocab_size": tokenizer.get_vocab_size()}
    torch.manual_seed(seed)
    kind = make_objective(objective, tokenizer, 0.5)
    model = kind.new_model(values)
    return model.to(resolve_device(device))


def _save(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    output: Path,
    step: int,
    options: PretrainOptions,
    config: Any,
) -> None:
    def save_model(folder: Path) -> None:
        training_config = model.config
        model.config = config
        model.save_pretrained(folder)
        model.config = training_config

    state = {"rng": torch.get_rng_state(), **optimizer_state(model, optimizer)}
    write_checkpoint(output, step, save_model, state, {"options": dataclasses.asdict(options)})


def _restore(model: LanguageModel, optimizer: torch.optim.Optimizer, output: Path, options: PretrainOptions) -> int:
    """Load the last checkpoint into model and optimizer, and return its step.

    The run must go on with the options that decide what a step is; the number of steps and the learning rate may
    change.
    """
    checkpoint, trainer = last_checkpoint(output)
    names = ["objective", "optimizer", "tokens_per_step", "micro_tokens", "seed"]
    for name in [*names, "mask_rate"] if options.objective == "mlm" else names:
        # Runs that began before there were others had the first objective.
        before, now = {"objective": "mlm", **trainer["options"]}[name], getattr(options, name)
        if before != now:
            raise InputError(f"{name} is {now!r} and the run in {output} has {before!r}; resume it with the same")
    saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
    state = read_state(checkpoint)
    torch.set_rng_state(state.pop("rng"))
    restore_optimizer(model, optimizer, state)
    return int(trainer["step"])
