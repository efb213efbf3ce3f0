"""What the server counts, in Prometheus's form."""

from __future__ import annotations

import os
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = tuple(2**n for n in range(17))


class Metrics:
    """Counters of one server. `registry` is its own, so that several apps can live in a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept: Any = {"registry": self.registry, "namespace": "modernbert"}
        self.requests = Counter("requests", "Requests answered.", ("route", "model", "status"), **kept)
        self.latency = Histogram(
            "request_seconds", "Time from a request to its reply.", ("route", "model"), buckets=_SECONDS, **kept
        )
        self.queued = Histogram(
            "queue_seconds", "Time until a request's first row is computed.", buckets=_SECONDS, **kept
        )
        self.tokens = Counter("tokens", "Tokens that models read for requests.", ("model",), **kept)
        self.texts = Counter("texts", "Texts answered.", ("model",), **kept)
        self.truncated = Counter("truncated_texts", "Texts cut to a model's context.", ("model",), **kept)
        self.batch_tokens = Histogram("batch_tokens", "Tokens of a batch.", buckets=_SIZES, **kept)
        self.batch_rows = Histogram("batch_rows", "Rows of a batch.", buckets=_SIZES[:11], **kept)
        self.computing = Counter("computing_seconds", "Time that engines computed.", **kept)
        self.generated = Counter("generated_tokens", "Tokens generated.", **kept)
        self.lost_lines = Counter("lost_log_lines", "Lines of the log that could not be written.", **kept)
        self.refused = Counter("refused_requests", "Requests refused because too much waited.", **kept)
        self.waiting = Gauge(
            "waiting_tokens", "Tokens accepted and not computed yet.", multiprocess_mode="livesum", **kept
        )

    def text(self) -> bytes:
        """All of it, as Prometheus reads it; of all workers, where there are several."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)
        return generate_latest(together)
