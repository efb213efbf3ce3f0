"""In which order should texts that wait be computed? A simulation: texts come at random times at 70 % of what one
machine computes, and each batch costs a fixed time and a time per token.

    python benchmarks/order.py        # half a minute

It prints, for several orders, the median and the 99th percentile of the time to an answer, of all texts, short ones and
long ones; and the ratio of the two that no order changes: where nothing waits, and where texts are all alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from modernbert.tools.bench import lengths_of

FIXED, EACH = 0.006, 0.00062  # seconds of a batch and of a token: base size, bfloat16, two Zen 4 cores
BUDGET, LOAD = 512, 0.7
Text = tuple[float, int, int]  # when it came, its tokens, its number
Order = Callable[[list[Text], float], list[Text]]

ORDERS: dict[str, Order] = {
    "as they came, what fits fills up": lambda waiting, now: waiting,
    "oldest first, then shortest": lambda waiting, now: waiting[:1] + sorted(waiting[1:], key=lambda one: one[1]),
    "arrival + cost": lambda waiting, now: sorted(waiting, key=lambda one: one[0] + EACH * one[1]),
    "arrival + twice the cost": lambda waiting, now: sorted(waiting, key=lambda one: one[0] + 2 * EACH * one[1]),
    "longest wait for its cost": lambda waiting, now: sorted(
        waiting, key=lambda one: (one[0] - now) / (FIXED + EACH * one[1])
    ),
    "shortest first": lambda waiting, now: sorted(waiting, key=lambda one: one[1]),
}


def arrivals(lengths: list[int], load: float) -> list[Text]:
    """Texts at random times."""
    chosen, at, found = random.Random(0), 0.0, []
    each = EACH * sum(lengths) / len(lengths) + FIXED / max(1.0, BUDGET * len(lengths) / sum(lengths))
    for number, length in enumerate(lengths):
        at += chosen.expovariate(load / each)
        found.append((at, length, number))
    return found


def waits(texts: list[Text], order: Order) -> list[float]:
    """Seconds to each text's answer."""
    now, done, coming, waiting = 0.0, [0.0] * len(texts), 0, list[Text]()
    while coming < len(texts) or waiting:
        while coming < len(texts) and texts[coming][0] <= now:
            waiting.append(texts[coming])
            coming += 1
        if not waiting:
            now = texts[coming][0]
            continue
        batch, tokens = list[Text](), 0
        for one in order(waiting, now):
            if not batch or tokens + one[1] <= BUDGET:
                batch.append(one)
                tokens += one[1]
        chosen = {number for *_, number in batch}
        waiting = [one for one in waiting if one[2] not in chosen]
        now += FIXED + EACH * tokens
        for came, _, number in batch:
            done[number] = now - came
    return done


def quantiles(times: list[float]) -> tuple[float, float]:
    """The median and the 99th percentile."""
    times = sorted(times)
    return times[len(times) // 2], times[int(0.99 * len(times))]


def main() -> None:
    """Simulate and print."""
    texts = arrivals(lengths_of("var20000:0"), LOAD)
    print(f"{'ms':34}{'p50':>7}{'p99':>7}{'ratio':>7}{'short p99':>11}{'long p99':>10}{'longest':>9}")
    for name, order in ORDERS.items():
        times = waits(texts, order)
        p50, p99 = quantiles(times)
        short = quantiles([time for time, text in zip(times, texts, strict=True) if text[1] < 64])[1]
        long = [time for time, text in zip(times, texts, strict=True) if text[1] > 300]
        cells = [1e3 * p50, 1e3 * p99, 1e3 * short, 1e3 * quantiles(long)[1], 1e3 * max(long)]
        print(f"{name:34}{cells[0]:7.0f}{cells[1]:7.0f}{p99 / p50:7.2f}{cells[2]:11.0f}{cells[3]:10.0f}{cells[4]:9.0f}")
    p50, p99 = quantiles([FIXED + EACH * tokens for _, tokens, _ in texts])
    print(f"texts that never wait: p99 is {p99 / p50:.2f} times p50")
    chosen, came, free, times = random.Random(0), 0.0, 0.0, list[float]()
    for _ in range(200_000):
        came += chosen.expovariate(LOAD)
        free = max(free, came) + 1
        times.append(free - came)
    p50, p99 = quantiles(times)
    print(f"texts that are all alike, one at a time, as they came: p99 is {p99 / p50:.2f} times p50")


if __name__ == "__main__":
    main()
