"""Many processes: Accelerate's set-up, sharding by FSDP2, and what each process keeps of a sharded run.

A sharded checkpoint has a file a process, in safetensors: this process's rows of every weight and of the optimizer's
state. Any number of processes reads them again, each the rows that it needs.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import gc
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group, which it would keep
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from modernbert.errors import CheckpointError, InputError
from modernbert.training.options import TrainingOptions

SHARDS = "shard-*-of-*.safetensors"
_MODEL, _OPTIMIZER = "model/", "optimizer/"
_LOST = ("Connection closed", "Connection reset", "Connection refused", "Broken pipe", "NCCL", "gloo", "Timed out")


def process(options: TrainingOptions) -> Any:
    """This process among those of the run: Accelerate's `PartialState`."""
    global _made_group
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise InputError("training needs accelerate: pip install 'modernbert[train]'") from error

    atexit.unregister(_leave)  # a run before this one ended in order; this one may not
    is_set_up = dist.is_initialized()
    # Evaluations are one process's work, which the others wait for.
    state = PartialState(cpu=_on_cpu(options), timeout=datetime.timedelta(hours=12))
    _made_group = _made_group or (dist.is_initialized() and not is_set_up)
    return state


_made_group = False  # whether `process` made the group of all processes, or found the caller's


def end_together(where: Any) -> None:
    """Wait for the other processes at the end of a run, and have this one leave their group when it exits.

    A thread of the group may still be releasing the last operation while Python shuts down. If it needs Python's lock
    then, the process is aborted, so the group is destroyed at exit, before that. Until then it serves the next run.
    """
    where.wait_for_everyone()
    if _made_group:
        atexit.register(_leave)


def _leave() -> None:
    gc.collect()  # models wrapped for the group keep it, and with it its threads
    if dist.is_initialized():
        dist.destroy_process_group()


def _on_cpu(options: TrainingOptions) -> bool:
    """Whether the run stays on the CPU, which Accelerate must know to connect its processes."""
    return options.device == "cpu" or not torch.accelerator.is_available()


def accelerator(options: TrainingOptions, output: Path) -> Any:
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
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes"):
        raise InputError("Accelerate is set up for FSDP; launch with its defaults and give --shard, which uses FSDP2")
    try:  # `precision` says what is computed in bfloat16, not Accelerate's environment
        return Accelerator(cpu=True if _on_cpu(options) else None, mixed_precision="no", **tracked)
    except ValueError as error:
        raise InputError(f"this process uses Accelerate in another way already: {error}") from error


def start_trackers(accelerator: Any, options: TrainingOptions) -> bool:
    """Start the trackers of the options; whether there are any."""
    if options.tracker:
        settings = {k: v if isinstance(v, int | float | str) else str(v) for k, v in vars(options).items()}
        accelerator.init_trackers("modernbert", config=settings)
    return bool(options.tracker)


def is_lost(error: Exception) -> bool:
    """Whether an error says that another process of the run is gone."""
    if not isinstance(error, RuntimeError) or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)


@contextlib.contextmanager
def listening() -> Iterator[threading.Event]:
    """An event that SIGTERM sets instead of ending the process."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def shard_model(model: Any, device: torch.device) -> None:
    """Share weights, gradients and, later, the optimizer's state over the processes: FSDP2, a unit a layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        raise InputError("shard needs several processes; start the command with torchrun or accelerate launch")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(value: Tensor) -> Tensor:
    """A tensor with the rows of all processes; all of them must call this together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def own(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def like(value: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, shared over the processes as another one is."""
    if not isinstance(model, DTensor):
        return value
    return distribute_tensor(value, model.device_mesh, model.placements, src_data_rank=None)


def own_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """This process's rows of all weights, and of the optimizer's state."""
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state[_MODEL + name] = own(parameter.detach()).contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{_OPTIMIZER}{name}/{key}"] = own(value.detach()).contiguous()
    return state


def restore_own_state(model: nn.Module, optimizer: torch.optim.Optimizer | None, checkpoint: Path) -> None:
    """Read this process's rows of a checkpoint that any number of processes wrote; without optimizer weights alone."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    with Rows(checkpoint) as rows, torch.no_grad():
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            size = parameter.shape[0]
            each = -(-size // processes)  # as torch.chunk shares them out
            start, stop = min(rank * each, size), min((rank + 1) * each, size)
            parameter.to_local().copy_(rows.read(_MODEL + name, start, stop))
            if optimizer is None:
                continue
            state: dict[str, Tensor] = {}
            for key in rows.keys_below(f"{_OPTIMIZER}{name}/"):
                full = f"{_OPTIMIZER}{name}/{key}"
                if rows.is_scalar(full):  # a count of steps, of which every process has its own
                    state[key] = rows.read_scalar(full)
                    continue
                part = rows.read(full, start, stop).to(parameter.device)
                state[key] = DTensor.from_local(
                    part, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
                )
            if state:
                optimizer.state[parameter] = state


def merged_weights(checkpoint: Path) -> dict[str, Tensor]:
    """All weights of a sharded checkpoint, whole, by their names."""
    with Rows(checkpoint) as rows:
        return {name: rows.read(_MODEL + name) for name in rows.keys_below(_MODEL)}


class Rows(contextlib.ExitStack):
    """Tensors whose rows are spread over the shards of a checkpoint, in their order.

    Raises:
        CheckpointError: a shard is missing or damaged.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        files = sorted(checkpoint.glob(SHARDS))
        if not files:
            raise CheckpointError("there is no shard")
        wanted = int(files[0].stem.rpartition("-")[2])
        if len(files) != wanted:
            raise CheckpointError(f"{checkpoint} holds {len(files)} of {wanted} shards; copy the others back")
        self.opened = []
        for file in files:
            try:
                self.opened.append(self.enter_context(safe_open(file, framework="pt")))
            except SafetensorError as error:
                self.close()
                raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from error
        self.keys = set(self.opened[0].keys())

    def keys_below(self, prefix: str) -> list[str]:
        """Names that begin with the prefix, without it."""
        return sorted(key.removeprefix(prefix) for key in self.keys if key.startswith(prefix))

    def is_scalar(self, key: str) -> bool:
        return not self.opened[0].get_slice(key).get_shape()

    def read_scalar(self, key: str) -> Tensor:
        """A number that every file has."""
        return self.opened[0].get_tensor(key)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a tensor, from all files that hold some of them."""
        parts: list[Tensor] = []
        first = 0
        for file in self.opened:
            part = file.get_slice(key)
            size = part.get_shape()[0]
            begin, end = max(start - first, 0), size if stop is None else min(stop - first, size)
            if begin < end or not parts:
                parts.append(part[min(begin, size) : max(end, min(begin, size))])
            first += size
        return torch.cat(parts)
