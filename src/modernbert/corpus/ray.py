"""The engine of a Ray cluster: actors that keep the model, on as many machines as there are.

The process that reads the corpus gives each actor one unit at a time, and reads a few ahead; units lie in Ray's store
meanwhile, and no more of them than that. An actor that is lost is replaced, and its unit is given to another one. At
the end, where actors have nothing left to do, they compute units as well that take long, and the first result counts:
`benchmarks/stragglers.py` simulates what that saves.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

from modernbert.checks import Options, option
from modernbert.corpus.contract import ATTEMPTS, Record, Unit
from modernbert.corpus.output import CorpusError
from modernbert.errors import InputError, printable
from modernbert.training.threads import cores, quota

_STARTS = 3  # actors that are lost before they have loaded the model, one after another
_WAIT = 0.5  # seconds between looks at what takes long
_KNOWN = 5  # units after which it is known how long one takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayOptions(Options):
    """Options of the engine `ray`."""

    address: str | None = option(
        None, "Cluster to run on: HOST:PORT, ray://HOST:PORT, or auto for this machine's.", otherwise="one started here"
    )
    actors: int | None = option(None, "Actors that compute.", least=1, otherwise="as many as the cluster has room for")
    cpus: float | None = option(
        None, "Cores of an actor; a fraction of one is shared.", above=0, otherwise="4, or its share of fewer"
    )
    gpus: float = option(0.0, "GPUs of an actor; a fraction of one is shared.", least=0)
    memory: int | None = option(None, "Bytes of memory that Ray reserves for an actor.", least=1, otherwise="none")
    store: int = option(300_000_000, "Bytes of the store of an instance that is started here.", least=80_000_000)
    timeout: float = option(60.0, "Seconds to reach the cluster in, and to wait for room in it.", above=0)
    copy_after: float = option(
        1.5, "Times the usual seconds of a unit, after which idle actors compute it as well; 0 for never.", least=0
    )


class RayEngine:
    """Runs units in actors of a Ray cluster.

    Args:
        options: see `RayOptions`.

    Raises:
        InputError: Ray is not installed.
    """

    options = RayOptions

    def __init__(self, **options: Any) -> None:
        self.given = RayOptions.of(options, "the engine ray")
        try:
            import ray
        except ImportError:
            ray = None
        if not hasattr(ray, "init"):  # a folder called ray is a package without it
            raise InputError("the engine ray needs ray: pip install 'modernbert[ray]'")
        self._ray = ray
        self._pool: _Pool | None = None

    @property
    def workers(self) -> list[int]:
        """Numbers of the actors' processes that run on this machine, at present."""
        return self._pool.workers if self._pool is not None else []

    def run(self, units: Iterator[Unit], work: Callable[[Unit], Record]) -> Generator[Record, None, None]:
        """See `modernbert.corpus.contract.Engine`."""
        started = self._connect()
        try:
            self._pool = _Pool(self._ray, self.given, work)
            yield from self._pool.run(units)
        except self._ray.exceptions.RayError as error:  # of the cluster itself
            raise CorpusError(f"the Ray cluster failed: {_why(error)}; the same call continues") from None
        finally:
            if self._pool is not None:
                self._pool.end()
                self._pool = None
            if started:
                self._ray.shutdown()

    def _connect(self) -> bool:
        """Have a cluster; whether it was reached, or started, here. Raises `CorpusError` with what was tried."""
        ray, address = self._ray, self.given.address
        if ray.is_initialized():
            return False
        quiet = {"logging_level": "ERROR", "log_to_driver": False}
        try:
            if address is None:
                count = min(cores(), int(quota() or cores()) or 1)
                own = {"num_cpus": count, "object_store_memory": self.given.store, "include_dashboard": False}
                ray.init("local", **own, **quiet)
                return True
            if address != "auto":
                self._check_reached(address)
            ray.init(address, **quiet)
        except (Exception, SystemExit) as error:
            said = printable(" ".join(str(error).split()) or type(error).__name__, limit=300)
            if address is None:
                raise CorpusError(f"no Ray instance can be started here: {said}; the same call continues") from None
            raise CorpusError(f"the Ray cluster at {address} cannot be used: {said}") from None
        return True

    def _check_reached(self, address: str) -> None:
        """Raise `ValueError` or `OSError` where no cluster answers in time; Ray itself would wait for minutes."""
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if not colon or not port.isdecimal():
            raise ValueError("it must be HOST:PORT, ray://HOST:PORT or auto")
        with socket.create_connection((host.strip("[]"), int(port)), timeout=self.given.timeout):
            pass
        if address.startswith("ray://"):
            return
        command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
        try:
            answer = subprocess.run(command, capture_output=True, timeout=self.given.timeout, check=False)
        except subprocess.TimeoutExpired:
            raise ValueError(f"it does not answer as Ray does within {self.given.timeout:g} seconds") from None
        if answer.returncode:
            raise ValueError("it does not answer as Ray does")


class _Actor:
    """What an actor is, on its machine."""

    def __init__(self, work: Any, threads: int) -> None:
        # Before torch is imported; the work imports it when it loads its model.
        os.environ |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "RAYON_NUM_THREADS": str(threads)}
        self.work = work

    def where(self) -> tuple[str, int]:
        """The machine and the number of the process."""
        return platform.node(), os.getpid()

    def prepare(self) -> Any:
        """Load the model; what the bits of numbers depend on here."""
        self.work.prepare()
        import torch

        from modernbert.tools.doctor import processor_features

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return [platform.machine(), *processor_features(), gpu, torch.__version__]

    def compute(self, unit: Unit) -> Record:
        """The record of a unit."""
        record: Record = self.work(unit)
        return record


@dataclasses.dataclass(eq=False)
class _Task:
    """A unit on its way."""

    unit: Any  # a reference to it in Ray's store
    name: str
    lost: int = 0  # actors that were lost with it
    running: int = 0  # actors that compute it
    is_done: bool = False


@dataclasses.dataclass(eq=False)
class _Member:
    """An actor. It is placed on a machine, loads the model, and computes, one call after another."""

    handle: Any
    call: Any  # the one that it has not ended; None where it has nothing to do
    since: float
    task: _Task | None = None  # that it computes
    pid: int = 0  # 0 until it is placed
    host: str = ""
    kind: Any = None  # None until it has loaded the model


class _Pool:
    """Actors, and what each of them computes."""

    def __init__(self, ray: Any, given: RayOptions, work: Callable[[Unit], Record]) -> None:
        self._ray, self._given = ray, given
        self._cpus, self._count = self._sizes()
        self._work, self._threads = ray.put(work), max(1, round(self._cpus))
        needs = {"num_cpus": self._cpus, "num_gpus": given.gpus, "memory": given.memory, "max_restarts": 0}
        self._kind = ray.remote(**{name: value for name, value in needs.items() if value is not None})(_Actor)
        self.members: list[_Member] = []
        self._ahead: collections.deque[_Task] = collections.deque()  # read and not given to anybody
        self._again: collections.deque[_Task] = collections.deque()  # whose actor was lost
        self._took: list[float] = []  # seconds of units
        self._unready = 0  # actors that were lost before they had the model, since one had it
        self._pause = 0.0  # until when no actor is started

    def _sizes(self) -> tuple[float, int]:
        """Cores of an actor, and the number of actors."""
        given = self._given
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        most = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
        cpus = given.cpus
        if cpus is None:
            cpus = min(4.0, most) if given.actors is None else min(4.0, most * len(nodes) / given.actors)
            cpus = float(int(cpus)) if cpus >= 1 else max(0.1, int(cpus * 100) / 100)
        fits = 0
        for node in nodes:
            gpus = node.get("GPU", 0.0) / given.gpus if given.gpus else float("inf")
            fits += int(min(node.get("CPU", 0.0) / cpus, gpus) + 1e-6)
        return cpus, given.actors or max(1, fits)

    @property
    def workers(self) -> list[int]:
        """Numbers of the actors' processes that run on this machine."""
        here = platform.node()
        return [member.pid for member in self.members if member.pid and member.host == here]

    def run(self, units: Iterator[Unit]) -> Iterator[Record]:
        """Records as units are finished."""
        placed = time.monotonic()  # when some actor last had a place
        is_over = False
        while True:
            while len(self.members) < self._count and time.monotonic() >= self._pause:
                self.members.append(self._made())
            while not is_over and len(self._ahead) < 1 + self._count // 8:
                unit = next(units, None)
                if unit is None:
                    is_over = True
                else:
                    self._ahead.append(_Task(self._ray.put(unit), unit.name))
            self._give()
            if is_over and not self._ahead and not self._again:
                if all(member.task is None or member.task.is_done for member in self.members):
                    return
                self._copy()
            calls = [member.call for member in self.members if member.call is not None]
            if not calls:  # all were lost, and new ones are not started yet
                time.sleep(_WAIT)
                continue
            for call in self._ray.wait(calls, num_returns=1, timeout=_WAIT)[0]:
                record = self._taken(call)
                self._give()  # before the record is dealt with
                if record is not None:
                    yield record
            if any(member.pid for member in self.members) or not self.members:
                placed = time.monotonic()
            elif time.monotonic() - placed > self._given.timeout:
                raise CorpusError(
                    f"no actor found room within {self._given.timeout:g} seconds: each needs {self._needs()}, and the "
                    f"cluster has {self._free()} free; let actors take less, and the same call continues"
                )

    def end(self) -> None:
        """End all actors, whatever they do."""
        for member in self.members:
            self._ray.kill(member.handle)
        self.members = []

    def _made(self) -> _Member:
        handle = self._kind.remote(self._work, self._threads)
        return _Member(handle, handle.where.remote(), time.monotonic())

    def _give(self) -> None:
        """Give units to actors that have nothing to do."""
        for member in self._idle():
            waiting = self._again or self._ahead
            if waiting:
                self._compute(member, waiting.popleft())

    def _copy(self) -> None:
        """Have idle actors compute what takes long, as well.

        Only what no actor was lost with, and once: the work counts how often a unit was begun, and looks for a text
        that ends its worker from the third time on. Only where the bits are the same, so that it does not matter which
        of two writes the shard last.
        """
        if not self._given.copy_after or len(self._took) < _KNOWN:
            return
        idle = self._idle()
        long, now = self._given.copy_after * statistics.median(self._took), time.monotonic()
        for member in sorted(self.members, key=lambda member: member.since):
            task = member.task
            if task is None or task.is_done or task.lost or task.running > 1 or now - member.since < long:
                continue
            other = next((one for one in idle if one.kind == member.kind), None)
            if other is not None:
                idle.remove(other)
                self._compute(other, task)

    def _idle(self) -> list[_Member]:
        return [member for member in self.members if member.call is None]

    def _compute(self, member: _Member, task: _Task) -> None:
        member.call, member.task, member.since = member.handle.compute.remote(task.unit), task, time.monotonic()
        task.running += 1

    def _taken(self, call: Any) -> Record | None:
        """The record of a call that has ended, if it is the first of its unit; takes the actor one step further."""
        exceptions = self._ray.exceptions
        member = next(member for member in self.members if member.call == call)
        try:
            answer = self._ray.get(call)
        except exceptions.RayTaskError as error:
            raise _cause(error) from None
        except exceptions.RayError as error:  # the actor or its machine is gone, or what it was given
            self._lost(member, error)
            return None
        if not member.pid:
            member.host, member.pid = answer
            member.call = member.handle.prepare.remote()
            return None
        task, member.task, member.call = member.task, None, None
        if task is None:
            member.kind, self._unready = answer, 0
            return None
        task.running -= 1
        if task.is_done:  # another actor was faster
            return None
        task.is_done, task.unit = True, None
        self._took.append(time.monotonic() - member.since)
        record: Record = answer
        return record

    def _lost(self, member: _Member, error: Exception) -> None:
        """Have an actor's unit computed by another one, and an actor in its place."""
        self.members.remove(member)
        self._ray.kill(member.handle)
        why, task = _why(error), member.task
        if task is None:
            self._unready += 1
            self._pause = time.monotonic() + min(60.0, 0.5 * 2**self._unready)
            if self._unready >= _STARTS and not any(one.kind for one in self.members):
                raise CorpusError(
                    f"an actor that loads the model was lost {self._unready} times: {why}; the memory may not be "
                    "enough: let fewer actors run, and the same call continues"
                )
            return
        task.running -= 1
        task.lost += 1
        if task.is_done or task.running:
            return
        if task.lost >= ATTEMPTS:
            raise CorpusError(
                f"the actors that computed {task.name} were lost {ATTEMPTS} times: {why}; the memory may not be enough "
                "for the model: let fewer actors run, and the same call continues"
            )
        self._again.append(task)

    def _needs(self) -> str:
        given = self._given
        memory = [f"{given.memory:,} bytes of memory"] if given.memory else []
        return " and ".join([f"{self._cpus:g} CPUs", *([f"{given.gpus:g} GPUs"] if given.gpus else []), *memory])

    def _free(self) -> str:
        free = self._ray.available_resources()
        return " and ".join(f"{free.get(name, 0.0):g} {name}s" for name in ("CPU", "GPU"))


def _cause(error: Any) -> BaseException:
    """What the work raised."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return cause
    return CorpusError(printable(_why(error), limit=500))


def _why(error: Exception) -> str:
    """One line of Ray's many: the last of a traceback, or the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    memory = [line for line in lines if "memory" in line.lower()]
    chosen = memory[0] if memory else lines[-1] if "Traceback" in str(error) else lines[0]
    return printable(chosen.rstrip("."), limit=300)
