"""The loop of a run: steps of packed batches under Accelerate, evaluations, checkpoints, the best one at the end.

Every random number comes from the seed and the number of the step, so that a killed run that is resumed ends in the
same bits. Every label of a step weighs the same, however many forward passes and processes share it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor

from modernbert.engines.cpu.library import denormals_flushed
from modernbert.engines.cpu.training import forget_work
from modernbert.errors import DivergedError, InputError, InterruptedRunError, TerminatedRunError
from modernbert.training.checkpoints import (
    best_before,
    checkpoints,
    discard,
    last_checkpoint,
    optimizer_state,
    restore_optimizer,
    resumable,
    set_damaged_aside,
    step_of,
    write_checkpoint,
    write_part,
)
from modernbert.training.contract import Evaluation, Feed, Objective, Outcome, Progress, ShardedObjective, Step
from modernbert.training.distributed import (
    accelerator,
    is_lost,
    listening,
    own,
    own_state,
    restore_own_state,
    shard_model,
    start_trackers,
    whole,
)
from modernbert.training.examples import moved, shared_out, shortened
from modernbert.training.folder import append_metrics, trim_metrics
from modernbert.training.memory import memory_kept
from modernbert.training.model import autocast, evaluating, save_memory, train_in_float32
from modernbert.training.optimizers import clip, freeze, make_optimizer
from modernbert.training.options import TrainingOptions
from modernbert.training.schedules import make_schedule, peak_rate


def fit(
    model: Any,
    feed: Feed,
    objective: Objective,
    options: TrainingOptions,
    output: Path,
    *,
    resume: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    begin: Callable[[], None] = lambda: None,
    shard: bool = False,
) -> Outcome:
    """Train a model, with checkpoints and `metrics.jsonl` under `output`.

    Args:
        model: of any class of this package; it is trained in place, and in float32: weights of another dtype are
            converted. Steps at the usual rates are below what the others resolve.
        feed: what to train on.
        objective: what to train for.
        options: how to train.
        output: folder of the run; it exists.
        resume: continue from the last checkpoint under `output`.
        report: called after every step.
        begin: called once everything is set up, before the first step.
        shard: share weights, gradients and optimizer over the processes; the objective is a `ShardedObjective`.

    Raises:
        InputError: there is nothing to train, or a tracker is not known.
        DivergedError: the loss is no number; the last checkpoint stays.
        InterruptedRunError: the process was asked to end (`TerminatedRunError`), or another one of the run is lost;
            what was done is kept.
    """
    with denormals_flushed(), memory_kept(), listening() as asked_to_end:
        run = _Run(model, feed, objective, options, output, resume, report, shard, asked_to_end)
        begin()
        try:
            return run.run()
        finally:
            forget_work()


@dataclasses.dataclass(eq=False)
class _Run:
    model: Any
    feed: Feed
    objective: Objective
    options: TrainingOptions
    output: Path
    resume: dataclasses.InitVar[bool]
    report: Callable[[Progress], None]
    is_sharded: bool
    asked_to_end: threading.Event

    def __post_init__(self, resume: bool) -> None:
        options = self.options
        self.accelerator = accelerator(options, self.output)
        self.total = self.feed.total
        self.place: dict[str, Any] | None = None
        self.schedule = make_schedule(options.schedule, self.total, options.warmup, options.decay)
        self.lr = peak_rate(options, self.model)
        train_in_float32(self.model)
        freeze(self.model, options.freeze_embeddings, options.freeze_layers)
        save_memory(self.model, options)
        self.bare = self.model.to(self.accelerator.device)
        if self.is_sharded:
            shard_model(self.bare, self.accelerator.device)
        optimizer = make_optimizer(self.bare, options)
        self.step, self.since_best, self.stopped, self.ended = 0, 0, "", False
        self.is_whole = True  # weights and optimizer are those after `step`, not in the middle of another one
        self.seconds, self.tokens = 0.0, 0
        self.started, self.wall = time.perf_counter(), 0.0  # the latter is of the run that this one continues
        self.best: tuple[int, float] | None = None
        if resume and checkpoints(self.output):
            self._restore(optimizer)
        # A sharded model is one already; Accelerate would replicate it.
        self.model = self.bare if self.is_sharded else self.accelerator.prepare(self.bare)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.begun = self.step

    @property
    def sharded(self) -> ShardedObjective:
        """The objective of a run whose weights are shared over the processes."""
        return cast(ShardedObjective, self.objective)

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def run(self) -> Outcome:
        try:
            return self._run()
        except KeyboardInterrupt:
            done = f"interrupted after step {self.step} of {self.total}"
            raise KeyboardInterrupt(f"{done}; {resumable(self.output)}") from None
        except RuntimeError as error:
            if not is_lost(error):
                raise
            self._lost(error)

    def _run(self) -> Outcome:
        options, objective = self.options, self.objective
        trackers = start_trackers(self.accelerator, options)
        if self.is_main:
            trim_metrics(self.output, self.step)
        began, speed = self.seconds, 0.0
        evaluation: Evaluation | None = None
        evaluated_at = -1
        self.bare.train()
        steps = self.feed.steps(self.step, self.place)
        while self.step < self.total and not self.stopped:
            started = time.perf_counter()
            step = next(steps)
            loss, norm, count = self._train_step(step)
            self.step, self.place, self.is_whole = self.step + 1, step.place, True
            took = time.perf_counter() - started
            self.seconds, self.tokens = self.seconds + took, self.tokens + count
            speed = count / took if not speed else 0.95 * speed + 0.05 * count / took
            metrics: dict[str, float] = {}
            last = self.step == self.total
            if last or self.step % (options.eval_every or self.feed.between) == 0:
                evaluation = self._evaluate()
                evaluated_at = self.step
                if evaluation is not None:
                    metrics = evaluation.metrics
                    self._compare(metrics)
            progress = Progress(
                step=self.step,
                steps=self.total,
                epoch=step.epoch,
                loss=loss,
                lr=self.lr * self.schedule(self.step - 1),
                grad_norm=norm,
                tokens=self.tokens,
                tokens_per_second=speed,
                seconds=self.seconds,
                seconds_left=(self.seconds - began) / (self.step - self.begun) * (self.total - self.step),
                metrics=metrics,
            )
            self._record(progress, trackers)
            wanted = self.step % options.save_every == 0 if options.save_every else evaluated_at == self.step
            is_best = options.keep_best and self.best == (self.step, metrics.get(objective.metric))
            if wanted or last or self.stopped or self.ended or is_best:
                self._save()
            if self.ended:
                raise TerminatedRunError(
                    f"ended by SIGTERM after step {self.step} of {self.total}; {resumable(self.output)}"
                )
        if self.best is not None and options.keep_best and self.best[0] != self.step:
            best = self.output / f"checkpoint-{self.best[0]}"
            if self.is_sharded:
                restore_own_state(self.bare, None, best)
            else:
                self.objective.load_weights(self.bare, best)
            evaluated_at = -1
        if evaluated_at != self.step or objective.reads_more_at_the_end:
            evaluation = self._evaluate(at_the_end=True)
        for tracker in self.accelerator.trackers:  # Accelerate's `end_training` would end the processes' group too
            tracker.finish()
        if self.is_sharded:
            weights = {name: whole(value.detach()).cpu() for name, value in self.bare.named_parameters()}
            model = self.sharded.rebuild(weights)
        else:
            model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return Outcome(
            model.eval(),
            evaluation,
            steps=self.step,
            best_step=None if self.best is None else self.best[0],
            seconds=self.seconds,
            tokens=self.tokens,
            stopped=self.stopped,
            wall_seconds=self._wall_seconds(),
        )

    def _wall_seconds(self) -> float:
        return self.wall + time.perf_counter() - self.started

    def _train_step(self, step: Step) -> tuple[float, float, int]:
        """One step: its loss, the norm of its gradients, and its tokens."""
        options, accelerator = self.options, self.accelerator
        factor = self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor * group["scale"]
        self.objective.at_step(self.step, self.total)
        processes = accelerator.num_processes
        shares = shared_out(step.passes, processes)
        seeds = iter(self._random(1, sum(map(len, shares))))
        drawn = [
            [next(seeds) for _ in share] for share in shares
        ]  # by item, so that they are the same on any number of processes
        mine = range(accelerator.process_index, len(shares), processes)
        weight = processes if mine else 0  # gradients are averaged over processes; one without a share adds nothing
        batches = [self.objective.collate(shares[i], drawn[i]) for i in mine or [len(shares) - 1]]
        if self.is_sharded:  # every process has to take part in every pass
            weight = processes
            batches = batches[: len(mine)]
            while len(batches) < -(-len(shares) // processes):
                batches.append(self.sharded.without_labels(self.objective.collate(shares[-1], drawn[-1])))
        counted = torch.tensor(
            [bool(weight) * sum(self.objective.count(batch) for batch in batches), float(self.asked_to_end.is_set())],
            dtype=torch.float64 if accelerator.device.type != "mps" else torch.float32,
            device=accelerator.device,
        )
        labels, asked = accelerator.reduce(counted, "sum").tolist()
        self.ended = bool(asked)
        batches = [moved(batch, accelerator.device) for batch in batches]
        seed = self._random(2 + accelerator.process_index)[0]  # of dropout
        if accelerator.device.type == "cpu":  # PyTorch's function asks for every kind of device, which takes a while
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

        def backward(loss: Tensor) -> None:
            with torch.autocast(accelerator.device.type, enabled=False):
                if accelerator.num_processes > 1:
                    accelerator.backward(loss * weight)
                else:  # Accelerate looks for installed packages each time
                    (loss * weight).backward()

        @contextlib.contextmanager
        def one_pass(is_last: bool) -> Iterator[Callable[[Tensor], None]]:
            # Gradients meet those of other processes once a step; whether they will is decided in the forward.
            if self.is_sharded:
                self.bare.set_requires_gradient_sync(is_last)
            if is_last or self.is_sharded:
                yield backward
                return
            with accelerator.no_sync(self.model):
                yield backward

        try:
            with autocast(options.precision, accelerator.device):
                loss_tensor = self.objective.losses(self.model, batches, labels or 1, one_pass)
        except torch.OutOfMemoryError as error:
            largest = max(len(batch["input_ids"]) for batch in batches)
            raise InputError(
                f"the device has no memory for a pass of {largest} tokens; lower micro_tokens ({options.micro_tokens})"
            ) from error
        loss = float(accelerator.reduce(loss_tensor.detach().float() * bool(weight), "sum"))
        most = options.max_grad_norm or math.inf
        clipped = clip(self.optimizer.optimizer, most)
        if clipped is None:
            clipped = float(whole(accelerator.clip_grad_norm_(self.model.parameters(), most)))
        norm = clipped
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._diverged(loss, norm, step)
        self.is_whole = False
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm, sum(item.tokens for some in step.passes for item in some)

    def _random(self, purpose: int, count: int = 1) -> list[int]:
        sequence = np.random.SeedSequence((self.options.seed, self.step, purpose))
        return [int(seed) for seed in sequence.generate_state(count, np.uint64) >> np.uint64(1)]

    def _diverged(self, loss: float, norm: float, step: Step) -> None:
        found = checkpoints(self.output)
        kept = f"the last good checkpoint is {found[-1]}" if found else "no checkpoint was made yet"
        items = [item for some in step.passes for item in some]
        texts = ", ".join(repr(shortened(item.record)) for item in items[:3])
        more = f" and {len(items) - 3} more" if len(items) > 3 else ""
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradients is {norm}"
        raise DivergedError(
            f"{what} at step {self.step + 1}; {kept}. Lower the learning rate ({self.lr:g}), or look at the "
            f"step's examples: {texts}{more}"
        )

    def _lost(self, error: Exception) -> NoReturn:
        if self.is_main and not self.is_sharded and self.step > self.begun and self.is_whole:
            with contextlib.suppress(OSError):
                self._save(alone=True)
        lost = f"a process of the run was lost after step {self.step} ({' '.join(str(error).split())[:120]})"
        raise InterruptedRunError(f"{lost}; {resumable(self.output)}") from error

    def _evaluate(self, at_the_end: bool = False) -> Evaluation | None:
        """Evaluate the model as it is; every process gets the result."""
        evaluation = None
        if self.is_main or self.is_sharded:
            options, device = self.options, self.accelerator.device
            with evaluating(self.bare, options.precision, device, self.is_sharded) as model:
                evaluation = self.objective.evaluate(model, at_the_end)
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            evaluation = broadcast_object_list([evaluation])[0]
        return evaluation

    def _compare(self, metrics: dict[str, float]) -> None:
        """Remember the best evaluation, and stop after too many that are not."""
        value, sign = metrics[self.objective.metric], 1 if self.objective.greater_is_better else -1
        better = math.isfinite(value) and (self.best is None or sign * value > sign * self.best[1])
        if better or (self.best is not None and value == self.best[1]):  # of equal ones the later
            self.best = (self.step, value)
        self.since_best = 0 if better else self.since_best + 1
        self._check_patience()

    def _check_patience(self) -> None:
        if self.options.patience is not None and self.since_best >= self.options.patience and self.step < self.total:
            times = f"{self.since_best} evaluation{'s' * (self.since_best > 1)}"
            self.stopped = f"no better {self.objective.metric} in {times}"

    def _record(self, progress: Progress, trackers: bool) -> None:
        values = dataclasses.asdict(progress)
        values |= {f"eval_{name}": value for name, value in values.pop("metrics").items()}
        if self.is_main:
            append_metrics(self.output, values)
            self.report(progress)
        if trackers:
            self.accelerator.log({k: v for k, v in values.items() if k not in ("step", "steps")}, step=progress.step)

    def _save(self, alone: bool = False) -> None:
        """Write a checkpoint; `alone` where the other processes are gone."""
        if not alone:
            self.accelerator.wait_for_everyone()
        wrong = [name for name, value in self.bare.named_parameters() if not bool(own(value).isfinite().all())]
        found = torch.tensor(float(len(wrong)), device=self.accelerator.device)
        if float(found if alone else self.accelerator.reduce(found, "sum")):  # of its rows a process knows alone
            name = wrong[0] if wrong else "a weight"
            raise DivergedError(
                f"{name} is no number any more after step {self.step}, which is not saved; lower the learning rate "
                f"({self.lr:g})"
            )
        if self.is_sharded:
            if self.is_main:
                discard(self.output, self.step)
            self.accelerator.wait_for_everyone()
            part = own_state(self.bare, self.optimizer.optimizer)
            write_part(self.output, self.step, part, self.accelerator.process_index, self.accelerator.num_processes)
            self.accelerator.wait_for_everyone()
        if self.is_main:
            self._write()
        if not alone:
            self.accelerator.wait_for_everyone()

    def _write(self) -> None:
        about = {
            "best": self.best,
            "since_best": self.since_best,
            "seconds": self.seconds,
            "wall_seconds": self._wall_seconds(),
            "tokens": self.tokens,
            "data": self.feed.fingerprint,
            "place": self.place,
        }
        # The one before stays, with the best one that it knows of, in case this one turns out to be of no use.
        keep = [step_of(path) for path in checkpoints(self.output)[-1:]]
        known = [self.best, best_before(self.output)]
        keep += [best[0] for best in known if best is not None and self.options.keep_best]
        if self.is_sharded:
            write_checkpoint(self.output, self.step, self.sharded.save_frame, None, about, keep)
        else:
            state = optimizer_state(self.bare, self.optimizer.optimizer)
            save = functools.partial(self.objective.save, self.bare)
            write_checkpoint(self.output, self.step, save, state, about, keep)

    def _restore(self, optimizer: torch.optim.Optimizer) -> None:
        checkpoint, about = last_checkpoint(self.output)
        if step_of(checkpoint) > self.total:
            name = "epochs" if self.options.max_steps is None else "max_steps"
            raise InputError(
                f"{name} is {getattr(self.options, name)}, {self.total} steps in all, and the run in {self.output} has "
                f"done {step_of(checkpoint)}; give more, or name another folder and start anew"
            )
        self.accelerator.wait_for_everyone()
        if self.is_main:
            set_damaged_aside(self.output, checkpoint)
        if about["data"] != self.feed.fingerprint:
            raise InputError(f"the run in {self.output} was trained on other data; resume it with the same")
        if self.is_sharded:
            restore_own_state(self.bare, optimizer, checkpoint)
        else:
            self.objective.load_weights(self.bare, checkpoint)
            restore_optimizer(self.bare, optimizer, checkpoint)
        self.step, self.place = step_of(checkpoint), about.get("place")
        self.seconds, self.tokens = about["seconds"], about["tokens"]
        self.wall = about.get("wall_seconds", self.seconds)
        best = about["best"]
        if best is not None and (not self.options.keep_best or (self.output / f"checkpoint-{best[0]}").is_dir()):
            self.best = (int(best[0]), float(best[1]))
        self.since_best = about["since_best"]
        self._check_patience()
