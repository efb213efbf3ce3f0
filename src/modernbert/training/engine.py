"""The loop of a run: steps of packed batches under Accelerate, evaluations, checkpoints, the best one at the end.

Every random number comes from the seed and the number of the step, so that a run that was killed goes on as if it had
not been. Every label of a step weighs the same, however many forward passes and processes share it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modernbert.errors import DivergedError, InputError
from modernbert.files import write_text
from modernbert.models.backbone import Backbone
from modernbert.models.base import PreTrainedModel
from modernbert.native.library import denormals_flushed
from modernbert.training.adapters import add_adapters, has_adapters
from modernbert.training.checkpoints import (
    checkpoints,
    last_checkpoint,
    optimizer_state,
    read_state,
    restore_optimizer,
    step_of,
    write_checkpoint,
)
from modernbert.training.contract import Batch, Evaluation, Objective, Outcome, Progress
from modernbert.training.examples import Example, StepPlan, by_tokens
from modernbert.training.optimizers import freeze, make_optimizer
from modernbert.training.options import TrainingOptions
from modernbert.training.precision import autocast
from modernbert.training.schedules import make_schedule


def fit(
    model: Any,
    examples: Sequence[Example],
    objective: Objective,
    options: TrainingOptions,
    output: Path,
    *,
    resume: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    begin: Callable[[], None] = lambda: None,
) -> Outcome:
    """Train a model, with checkpoints and `metrics.jsonl` under `output`.

    Args:
        model: of any class of this package; it is trained in place.
        examples: what to train on.
        objective: what to train for.
        options: how to train.
        output: folder of the run; it exists.
        resume: go on from the last checkpoint under `output`.
        report: called after every step.
        begin: called once everything is set up, before the first step.

    Raises:
        InputError: there is nothing to train, or a tracker is not known.
        DivergedError: the loss is no number; the last checkpoint stays.
    """
    with denormals_flushed():
        run = _Run(model, examples, objective, options, output, resume, report)
        begin()
        return run.run()


class _Run:
    def __init__(
        self,
        model: Any,
        examples: Sequence[Example],
        objective: Objective,
        options: TrainingOptions,
        output: Path,
        resume: bool,
        report: Callable[[Progress], None],
    ) -> None:
        if not examples:
            raise InputError("there is no example to train on")
        self.accelerator = _accelerator(options, output)
        self.objective, self.options, self.output, self.report = objective, options, output, report
        self.examples = examples
        lengths = np.array([example.tokens for example in examples], dtype=np.int64)
        self.plan = StepPlan(lengths, options.batch_size, options.batch_tokens, options.seed)
        self.total = options.max_steps or max(1, self.plan.steps(options.epochs))
        self.epoch_steps = len(self.plan.epoch(0))
        self.schedule = make_schedule(options.schedule, self.total, options.warmup, options.decay)
        if options.gradient_checkpointing:
            (model if isinstance(model, PreTrainedModel) else model.model).gradient_checkpointing_enable()
        if options.lora_rank:
            model = add_adapters(model, options.lora_rank, options.lora_alpha)
        freeze(model, options.freeze_embeddings, options.freeze_layers)
        self.bare = model.to(self.accelerator.device)
        optimizer = make_optimizer(self.bare, options)
        self.step, self.since_best, self.stopped = 0, 0, ""
        self.seconds, self.tokens = 0.0, 0
        self.data = hashlib.sha256(lengths.tobytes()).hexdigest()
        self.best: tuple[int, float] | None = None
        if resume and checkpoints(output):
            self._restore(optimizer)
        self.model, self.optimizer = self.accelerator.prepare(self.bare, optimizer)
        self.begun = self.step

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def run(self) -> Outcome:
        options, objective = self.options, self.objective
        trackers = bool(options.tracker)
        if trackers:
            settings = {k: v if isinstance(v, int | float | str) else str(v) for k, v in vars(options).items()}
            self.accelerator.init_trackers("modernbert", config=settings)
        self._trim_metrics()
        began, speed = self.seconds, 0.0
        evaluation: Evaluation | None = None
        evaluated_at = -1
        self.bare.train()
        steps = self._steps()
        while self.step < self.total and not self.stopped:
            started = time.perf_counter()
            chosen, epoch = next(steps)
            loss, norm, count = self._train_step(chosen)
            self.step += 1
            took = time.perf_counter() - started
            self.seconds, self.tokens = self.seconds + took, self.tokens + count
            speed = count / took if not speed else 0.95 * speed + 0.05 * count / took
            figures: dict[str, float] = {}
            last = self.step == self.total
            if last or self.step % (options.eval_every or self.epoch_steps) == 0:
                evaluation = self._evaluate()
                evaluated_at = self.step
                if evaluation is not None:
                    figures = evaluation.figures
                    self._compare(figures)
            progress = Progress(
                step=self.step,
                steps=self.total,
                epoch=epoch,
                loss=loss,
                lr=options.lr * self.schedule(self.step - 1),
                grad_norm=norm,
                tokens=self.tokens,
                tokens_per_second=speed,
                seconds=self.seconds,
                seconds_left=(self.seconds - began) / (self.step - self.begun) * (self.total - self.step),
                figures=figures,
            )
            self._record(progress, trackers)
            wanted = self.step % options.save_every == 0 if options.save_every else evaluated_at == self.step
            if wanted or last or self.stopped or self.best == (self.step, figures.get(objective.metric)):
                self._save()
        if self.best is not None and options.keep_best and self.best[0] != self.step:
            self.objective.load_weights(self.bare, self.output / f"checkpoint-{self.best[0]}")
            evaluated_at = -1
        if evaluated_at != self.step:
            evaluation = self._evaluate()
        if trackers:
            self.accelerator.end_training()
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        best = None if self.best is None else self.best[0]
        return Outcome(model.eval(), evaluation, self.step, best, self.seconds, self.tokens, self.stopped)

    def _steps(self) -> Iterator[tuple[list[int], float]]:
        """The examples of each step from the present one on, and the epochs that are done after it."""
        number, epoch = 0, 0
        while True:
            groups = self.plan.epoch(epoch)
            for i, group in enumerate(groups, 1):
                if number >= self.step:
                    yield group, epoch + i / len(groups)
                number += 1
            epoch += 1

    def _train_step(self, chosen: list[int]) -> tuple[float, float, int]:
        """One step: its loss, the norm of its gradients, and its tokens."""
        options, accelerator = self.options, self.accelerator
        factor = self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * factor * group["scale"]
        # Every process collates the whole step, so that all know its number of labels, and trains on its share.
        groups = by_tokens([self.examples[i].tokens for i in chosen], options.micro_tokens)
        processes = accelerator.num_processes
        while len(groups) % processes:  # no process may sit out a step
            largest = max(range(len(groups)), key=lambda g: len(groups[g]))
            half = len(groups[largest]) // 2
            if not half:
                break
            groups[largest : largest + 1] = [groups[largest][:half], groups[largest][half:]]
        generator = torch.Generator().manual_seed(self._random(1))
        batches = [self.objective.collate([self.examples[chosen[i]] for i in group], generator) for group in groups]
        total = sum(self.objective.count(batch) for batch in batches)
        mine = batches[accelerator.process_index :: processes]
        weight = processes if mine else 0  # gradients are averaged over processes; one without a share adds nothing
        mine = [_moved(batch, accelerator.device) for batch in mine or batches[-1:]]
        torch.manual_seed(self._random(2 + accelerator.process_index))  # of dropout

        def backward(loss: Tensor) -> None:
            with torch.autocast(accelerator.device.type, enabled=False):
                accelerator.backward(loss * weight)

        @contextlib.contextmanager
        def one_pass(is_last: bool) -> Iterator[Callable[[Tensor], None]]:
            # Gradients meet those of other processes once a step; whether they will is settled in the forward.
            with contextlib.nullcontext() if is_last else accelerator.no_sync(self.model):
                yield backward

        try:
            with autocast(options.precision, accelerator.device):
                loss_tensor = self.objective.losses(self.model, mine, max(total, 1), one_pass)
        except torch.OutOfMemoryError as error:
            largest = max(len(batch["input_ids"]) for batch in mine)
            raise InputError(
                f"the device has no memory for a pass of {largest} tokens; lower micro_tokens ({options.micro_tokens})"
            ) from error
        loss = float(accelerator.reduce(loss_tensor.detach().float() * bool(weight), "sum"))
        norm = float(accelerator.clip_grad_norm_(self.model.parameters(), options.max_grad_norm or math.inf))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._diverged(loss, norm, chosen)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm, sum(self.examples[i].tokens for i in chosen)

    def _random(self, purpose: int) -> int:
        sequence = np.random.SeedSequence((self.options.seed, self.step, purpose))
        return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))

    def _diverged(self, loss: float, norm: float, chosen: list[int]) -> None:
        found = checkpoints(self.output)
        kept = f"the last good checkpoint is {found[-1]}" if found else "no checkpoint was made yet"
        texts = ", ".join(repr(_shortened(self.examples[i].record)) for i in chosen[:3])
        more = f" and {len(chosen) - 3} more" if len(chosen) > 3 else ""
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradients is {norm}"
        raise DivergedError(
            f"{what} at step {self.step + 1}; {kept}. Lower the learning rate ({self.options.lr}), or look at the "
            f"step's examples: {texts}{more}"
        )

    def _evaluate(self) -> Evaluation | None:
        """Evaluate the model as it is; every process gets the figures."""
        evaluation = None
        if self.is_main:
            self.bare.eval()
            model = self.bare.get_base_model() if has_adapters(self.bare) else self.bare
            packed = model is self.bare and self.accelerator.device.type == "cpu"
            if packed:
                model = copy.deepcopy(model).optimize_for_inference()
            precision = "float32" if packed else self.options.precision
            with torch.no_grad(), autocast(precision, self.accelerator.device):
                evaluation = self.objective.evaluate(model)
            if packed:  # it holds itself in a circle, and would wait long to be collected
                for module in model.modules():
                    if isinstance(module, Backbone):
                        module.fused = None
            self.bare.train()
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            evaluation = broadcast_object_list([evaluation])[0]
        return evaluation

    def _compare(self, figures: dict[str, float]) -> None:
        """Remember the best evaluation, and stop after too many that are not."""
        value, sign = figures[self.objective.metric], 1 if self.objective.greater_is_better else -1
        better = math.isfinite(value) and (self.best is None or sign * value > sign * self.best[1])
        if better or (self.best is not None and value == self.best[1]):  # of equal ones the one that learnt longer
            self.best = (self.step, value)
        self.since_best = 0 if better else self.since_best + 1
        self._stop_if_patience_ends()

    def _stop_if_patience_ends(self) -> None:
        if self.options.patience is not None and self.since_best >= self.options.patience and self.step < self.total:
            self.stopped = f"no better {self.objective.metric} in {self.since_best} evaluations"

    def _record(self, progress: Progress, trackers: bool) -> None:
        values = dataclasses.asdict(progress)
        values |= {f"eval_{name}": value for name, value in values.pop("figures").items()}
        if self.is_main:
            with (self.output / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
            self.report(progress)
        if trackers:
            self.accelerator.log({k: v for k, v in values.items() if k not in ("step", "steps")}, step=progress.step)

    def _trim_metrics(self) -> None:
        """Forget the steps after the checkpoint that the run goes on from."""
        path = self.output / "metrics.jsonl"
        if not self.is_main or not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            with contextlib.suppress(ValueError):
                if line.endswith("\n") and json.loads(line)["step"] <= self.step:
                    kept.append(line)
        write_text(path, "".join(kept))

    def _save(self) -> None:
        self.accelerator.wait_for_everyone()
        if not self.is_main:
            return
        about = {
            "best": self.best,
            "since_best": self.since_best,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "data": self.data,
            "options": dataclasses.asdict(self.options),
        }
        state = optimizer_state(self.bare, self.optimizer.optimizer)
        wrong = [name for name, value in self.bare.named_parameters() if not bool(value.isfinite().all())]
        if wrong:
            raise DivergedError(
                f"{wrong[0]} is no number any more after step {self.step}, which is not saved; lower the learning rate "
                f"({self.options.lr})"
            )
        # The one before stays, with the best one that it knows of, in case this one turns out to be of no use.
        before = checkpoints(self.output)[-1:]
        keep = [step_of(path) for path in before]
        known = [self.best] + ([last_checkpoint(self.output)[1]["best"]] if before else [])
        keep += [best[0] for best in known if best is not None and self.options.keep_best]
        write_checkpoint(
            self.output, self.step, lambda folder: self.objective.save(self.bare, folder), state, about, keep
        )

    def _restore(self, optimizer: torch.optim.Optimizer) -> None:
        checkpoint, about = last_checkpoint(self.output)
        if about["data"] != self.data:
            raise InputError(f"the run in {self.output} was trained on other data; resume it with the same")
        self.objective.load_weights(self.bare, checkpoint)
        restore_optimizer(self.bare, optimizer, read_state(checkpoint))
        self.step = step_of(checkpoint)
        self.seconds, self.tokens = about["seconds"], about["tokens"]
        best = about["best"]
        if best is not None and (self.output / f"checkpoint-{best[0]}").is_dir():
            self.best = (int(best[0]), float(best[1]))
        self.since_best = about["since_best"]
        self._stop_if_patience_ends()


def process(options: TrainingOptions) -> Any:
    """This process among those of the run: Accelerate's `PartialState`."""
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise InputError("training needs accelerate: pip install 'modernbert[train]'") from error
    # Evaluations are one process's work, which the others wait for.
    return PartialState(cpu=options.device == "cpu", timeout=datetime.timedelta(hours=12))


def _accelerator(options: TrainingOptions, output: Path) -> Any:
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers

    process(options)
    tracked: dict[str, Any] = {}
    if options.tracker:
        known = sorted(str(name) for name in get_available_trackers())
        unknown = [name for name in options.tracker if name not in known]
        if unknown:
            raise InputError(
                f"tracker is {unknown[0]}; of those that Accelerate knows {', '.join(known)} are installed"
            )
        tracked = {"log_with": list(options.tracker), "project_dir": str(output)}
    try:  # `precision` says what is computed in bfloat16, not Accelerate's environment
        return Accelerator(cpu=True if options.device == "cpu" else None, mixed_precision="no", **tracked)
    except ValueError as error:
        raise InputError(f"this process uses Accelerate in another way already: {error}") from error


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device) if isinstance(v, Tensor) and k != "cu_seqlens" else v for k, v in batch.items()}


def _shortened(record: Any) -> str:
    value = record
    if isinstance(record, dict):
        texts = [v for v in record.values() if isinstance(v, str) and v]
        value = texts[0] if texts else record
    said = " ".join(str(value).split())
    return said if len(said) <= 60 else said[:57] + "..."
