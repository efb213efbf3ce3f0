"""Slow and lost workers of a job over a corpus, simulated: how long it takes, by size of shards and copies.

Workers take shards one after another, as the engines do. Each has a speed of its own, a few are much slower, single
shards meet something slow, and workers are lost at random: the shard is computed anew by another worker, and a new
worker needs a while to load its model. At the end, where workers have nothing left to do, shards that take long are
computed by them as well (`copy_after` of the engine `ray`), and the first result counts. Nothing is random but by the
seed, so that the numbers of docs/scale.md can be had again:

    python benchmarks/stragglers.py
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import itertools
import json
import random
import statistics
import sys

SIZES = (256, 1024, 4096, 16384, 65536)
COPIES = (0.0, 1.5, 2.0, 3.0, 5.0)


@dataclasses.dataclass(frozen=True)
class World:
    """What happens to workers.

    Attributes:
        texts, workers: of the job.
        rate: texts a second of a usual worker.
        overhead: seconds that a shard takes beside its texts: to hand it over, and to write it.
        spread: standard deviation of the logarithm of workers' speeds.
        slow, slowness: share of the workers that are slower, and how many times.
        hit, hardness: share of the shards that meet something slow, and how many times longer they take.
        lifetime: hours until a worker is lost, on average.
        start: seconds until a new worker computes.
    """

    texts: int
    workers: int
    rate: float = 50.0
    overhead: float = 0.1
    spread: float = 0.1
    slow: float = 0.01
    slowness: float = 4.0
    hit: float = 0.002
    hardness: float = 5.0
    lifetime: float = 24.0
    start: float = 20.0


@dataclasses.dataclass
class Outcome:
    """Times the seconds that the job would take if no worker ever waited, and the share of work done in vain."""

    times: float
    wasted: float
    lost: int
    copies: int


def simulate(world: World, size: int, copy_after: float, seed: int) -> Outcome:
    """One job."""
    chosen = random.Random(seed)
    speeds = [
        world.rate
        * chosen.lognormvariate(0.0, world.spread)
        / (world.slowness if chosen.random() < world.slow else 1.0)
        for _ in range(world.workers)
    ]
    counts = [size] * (world.texts // size) + [world.texts % size] * bool(world.texts % size)
    waiting, done = list(range(len(counts)))[::-1], [False] * len(counts)
    was_lost, running = set(), {}  # shard -> workers that compute it
    ends = itertools.count()
    events: list[tuple[float, int, str, int]] = []  # time, tie, what, worker
    task: list[int | None] = [None] * world.workers
    since, current = [0.0] * world.workers, [0] * world.workers  # the number of a worker's valid event
    dies = [chosen.expovariate(1 / (world.lifetime * 3600)) for _ in range(world.workers)]
    idle: set[int] = set()
    took: list[float] = []
    now, left, wasted, lost, copies = 0.0, len(counts), 0.0, 0, 0

    def push(at: float, what: str, worker: int) -> None:
        current[worker] = next(ends)
        heapq.heappush(events, (at, current[worker], what, worker))

    def begin(worker: int, shard: int) -> None:
        task[worker], since[worker] = shard, now
        running.setdefault(shard, set()).add(worker)
        seconds = world.overhead + counts[shard] / speeds[worker]
        seconds *= world.hardness if chosen.random() < world.hit else 1.0
        ends_at = now + seconds
        push(*((dies[worker], "lost") if dies[worker] < ends_at else (ends_at, "done")), worker)

    def free(worker: int) -> None:
        if waiting:
            begin(worker, waiting.pop())
        else:
            idle.add(worker)
            copy()

    def copy() -> None:
        nonlocal copies
        if not copy_after or len(took) < 5 or waiting:
            return
        long = copy_after * statistics.median(took[-1000:])
        slow = [(since[w], w) for w in range(world.workers) if task[w] is not None and not done[task[w]]]
        for begun, worker in sorted(slow):
            shard = task[worker]
            if not idle:
                return
            if shard in was_lost or len(running[shard]) > 1:
                continue
            if now < begun + long:  # nobody after it takes longer
                heapq.heappush(events, (begun + long, next(ends), "look", -1))
                return
            copies += 1
            begin(idle.pop(), shard)

    for worker in range(world.workers):
        free(worker)
    while left:
        at, number, what, worker = heapq.heappop(events)
        if what == "look":
            now = max(now, at)
            copy()
            continue
        if number != current[worker]:
            continue
        now = at
        if what == "up":
            free(worker)
            continue
        shard = task[worker]
        task[worker] = None
        running[shard].discard(worker)
        if what == "done":
            took.append(now - since[worker])
            if done[shard]:
                wasted += now - since[worker]
            else:
                done[shard] = True
                left -= 1
            free(worker)
            continue
        lost += 1
        wasted += now - since[worker]
        dies[worker] = now + world.start + chosen.expovariate(1 / (world.lifetime * 3600))
        push(now + world.start, "up", worker)
        was_lost.add(shard)
        if not done[shard] and not running[shard]:
            waiting.append(shard)
            if idle:
                begin(idle.pop(), waiting.pop())
    # Calls that lose against a copy are ended with the job.
    wasted += sum(now - since[w] for w in range(world.workers) if task[w] is not None)
    ideal = world.texts / sum(speeds)
    return Outcome(now / ideal, wasted / (ideal * world.workers), lost, copies)


def table(world: World, seeds: int) -> list[dict[str, float]]:
    """The mean over seeds of each size of shards and of each rule for copies."""
    rows = []
    for size, copy_after in itertools.product(SIZES, COPIES):
        found = [simulate(world, size, copy_after, seed) for seed in range(seeds)]
        row = {"shard_size": size, "copy_after": copy_after}
        row |= {name: round(statistics.mean(vars(one)[name] for one in found), 4) for name in vars(found[0])}
        row["worst"] = round(max(one.times for one in found), 4)
        rows.append(row)
    return rows


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--texts", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--lifetime", type=float, default=World.lifetime, help="hours until a worker is lost")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    for texts, workers in itertools.product(given.texts, given.workers):
        world = World(texts, workers, lifetime=given.lifetime)
        rows = table(world, given.seeds)
        if given.json:
            print(json.dumps({**dataclasses.asdict(world), "rows": rows}))
            continue
        print(f"\n{texts:,} texts, {workers} workers of {world.rate:g} texts/s, each lost every {world.lifetime:g} h:")
        print("times the seconds without any waiting (share of work in vain)")
        print(f"{'texts a shard':>13}" + "".join(f"{f'copies at {c:g}' if c else 'no copies':>18}" for c in COPIES))
        for size in SIZES:
            cells = [row for row in rows if row["shard_size"] == size]
            shown = (f"{row['times']:.3f} ({100 * row['wasted']:.1f} %)" for row in cells)
            print(f"{size:>13,}" + "".join(f"{cell:>18}" for cell in shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
