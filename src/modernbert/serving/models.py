"""The models of a server: which there are, what each can do, and which one a request means."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from modernbert.errors import InputError, listed
from modernbert.indexing.index import Index, open_index
from modernbert.models.placement import resolve_device
from modernbert.models.sharing import SharedEncoder, encoder_of
from modernbert.pipelines import TASKS, pipeline, small_model, task_of
from modernbert.pipelines.base import Pipeline, left_plain
from modernbert.pipelines.one_pass import OnePass
from modernbert.serving.engine import Engine
from modernbert.serving.metrics import Metrics
from modernbert.serving.options import ModelChoice, ServeOptions
from modernbert.serving.problems import RequestError, UnknownModelError

logger = logging.getLogger(__name__)

_BUDGETS = {"cpu": 512, "cuda": 16384}  # tokens of a batch: short enough that others soon get their turn
# What else a model can do that was loaded for a task.
_ALSO = {
    "sentence-embedding": ("text-ranking", "feature-extraction"),
    "late-interaction": ("text-ranking",),
    "text-classification": ("text-ranking", "zero-shot-classification"),
    "text-ranking": ("text-classification",),
    "text-generation": ("text-scoring",),
}
# What reads one text, so that several of them can answer from one pass.
ONE_TEXT = (
    *("sentence-embedding", "sparse-embedding", "late-interaction", "text-classification", "token-classification"),
    *("fill-mask", "feature-extraction"),
)


@dataclasses.dataclass
class Served:
    """A model with a name, and its pipelines by task."""

    name: str
    source: str
    pipelines: dict[str, Pipeline[Any, Any, Any]]
    created: int

    @property
    def first(self) -> Pipeline[Any, Any, Any]:
        """The pipeline of what its head was made for."""
        return next(iter(self.pipelines.values()))

    @property
    def context(self) -> int:
        """Tokens of a text at the most."""
        return self.first.context


class Chosen(NamedTuple):
    """What gives one of several answers."""

    served: Served
    task: str

    @property
    def key(self) -> str:
        """The name of its answer in what computes several."""
        return f"{self.served.name}:{self.task}"

    @property
    def pipeline(self) -> Pipeline[Any, Any, Any]:
        """What computes it alone."""
        return self.served.pipelines[self.task]


def _entails(model: Any) -> bool:
    """Whether a classifier was trained on entailment, by the names of its labels."""
    return any(label.lower().startswith("entail") for label in model.config.label2id)


class Models:
    """All models of a server, loaded, and the engines that compute them.

    Models whose encoders hold the same weights share one in memory; of those that are given, those that do already.

    Args:
        options: of the server.
        metrics: counts.
        given: pipelines that are loaded already, by name.

    Raises:
        InputError, NotFoundError, CheckpointError: a model cannot be loaded.
    """

    def __init__(self, options: ServeOptions, metrics: Metrics, given: dict[str, Pipeline[Any, Any, Any]]) -> None:
        self.options, self.metrics = options, metrics
        self.engines: dict[torch.device, Engine] = {}
        self._lock = threading.Lock()
        self.served: dict[str, Served] = {}
        choices = [ModelChoice.parse(text) for text in options.model]
        if not choices and not given:
            first = {name: task for task, (_, name) in reversed(TASKS.items()) if name is not None}
            for name, task in reversed(first.items()):
                choices.append(ModelChoice(f"small-{name}", str(small_model(name)), task, alone=False))
        shared: list[SharedEncoder] = []
        for name, made in given.items():
            self._add(ModelChoice(name, type(made.model).__name__), made)
        for choice in choices:
            if choice.name in self.served and self.served[choice.name].source != choice.source:
                raise InputError(f"two models are called {choice.name!r}; give one of them another NAME=")
            dtype = options.dtype or (None if choice.alone else "float32")  # as the package's small models are run
            with left_plain():
                made = pipeline(choice.task or _wanted(choice), choice.source, device=_device(options), dtype=dtype)
            _share(shared, choice.name, made)
            self._add(choice, made)
        for one in shared:
            one.finish(frozen=True)
        for text in options.adapter:
            self._add_adapted(text, [choice for choice in choices if choice.alone])
        self.together = self._together()

    def _together(self) -> list[OnePass]:
        """For each encoder all that can answer from one pass."""
        groups: dict[int, dict[str, Pipeline[Any, Any, Any]]] = {}
        for served in self.served.values():
            for task, one in served.pipelines.items():
                body = encoder_of(one.model)
                if task in ONE_TEXT and body is not None:
                    groups.setdefault(id(body), {})[Chosen(served, task).key] = one
        found = []
        for group in groups.values():
            with contextlib.suppress(InputError):  # of a model with adapters, which has no pass that others could use
                found.append(OnePass(group))
        return found

    @property
    def sharing(self) -> list[list[str]]:
        """The names of models that share an encoder, where there are several."""
        names = [list(dict.fromkeys(key.rpartition(":")[0] for key in one.pipelines)) for one in self.together]
        return [some for some in names if len(some) > 1]

    def find_together(self, wanted: Sequence[tuple[str | None, str | None]]) -> tuple[OnePass, list[Chosen]]:
        """What gives several answers from one pass.

        Args:
            wanted: the model and the task of each, either of which may be None; if there are none, all models that
                share an encoder, or that the first model shares.

        Raises:
            UnknownModelError: there is no such model, or no such task of it.
            RequestError: they share no encoder.
        """
        if not wanted:
            if not self.together:
                raise UnknownModelError(
                    f"no model of this server answers from a shared pass; it serves {self._offers()}"
                )
            most = max(self.together, key=lambda one: len({key.rpartition(":")[0] for key in one.pipelines}))
            names = list(dict.fromkeys(key.rpartition(":")[0] for key in most.pipelines))
            return most, [self._able(name, None, most)[0] for name in names]
        for name, task in wanted:  # what is unknown is said before what does not go together
            self.find(name, task or (self.served[name].first.task if name in self.served else ""))
        each = [[self._able(name, task, one) for name, task in wanted] for one in self.together]
        for one, able in zip(self.together, each, strict=True):
            if all(able):
                return one, [some[0] for some in able]
        shared = "; ".join(", ".join(one.pipelines) for one in self.together) or "none"
        asked = ", ".join(":".join(filter(None, one)) for one in wanted)
        raise RequestError(f"{asked} are not answered from one pass; what shares an encoder here is {shared}")

    def _able(self, name: str | None, task: str | None, one: OnePass) -> list[Chosen]:
        """What of one encoder gives an answer, what was made for it first."""
        found = [
            Chosen(served, own)
            for served in self.served.values()
            if name in (None, "", served.name)
            for own in served.pipelines
            if task in (None, own) and Chosen(served, own).key in one.pipelines
        ]
        return sorted(found, key=lambda chosen: chosen.served.first.task != chosen.task)

    def _add_adapted(self, text: str, choices: list[ModelChoice]) -> None:
        """Load a model once more with an adapter, which is merged, so that no request waits for a switch."""
        adapted = ModelChoice.of_adapter(text)
        if len(choices) != 1:
            raise InputError(
                f"adapter is {text!r} and there are {len(choices)} models; give one model, or the adapter's folder as "
                f"a model: --model {text}"
            )
        if adapted.name in self.served:
            raise InputError(f"two models are called {adapted.name!r}; give one of them another NAME=")
        source, how = choices[0].source, {"adapter": adapted.source}
        task = choices[0].task or _wanted(choices[0], **how)
        made = pipeline(task, source, device=_device(self.options), dtype=self.options.dtype, **how)
        self._add(dataclasses.replace(adapted, task=choices[0].task), made)

    def _add(self, choice: ModelChoice, made: Pipeline[Any, Any, Any]) -> None:
        served = self.served.setdefault(choice.name, Served(choice.name, choice.source, {}, int(time.time())))
        served.pipelines[made.task] = made
        for task in _ALSO.get(made.task, ()) if choice.task is None or not choice.alone else ():
            if task in served.pipelines or (task == "zero-shot-classification" and not _entails(made.model)):
                continue
            try:
                model = made.model.model if task == "feature-extraction" else made.model  # the encoder of sentences'
                served.pipelines[task] = pipeline(task, model, made.tokenizer)
            except InputError as error:
                logger.debug("%s does not serve %s: %s", choice.name, task, error)

    def does(self, name: str | None, task: str) -> bool:
        """Whether the model of a name, or the first one, was loaded for a task."""
        served = self.served.get(name, None) if name else next(iter(self.served.values()))
        return served is not None and served.first.task == task

    def find(self, name: str | None, task: str) -> tuple[Served, Pipeline[Any, Any, Any]]:
        """The model that a request means, by name or as the first that can do its task.

        Raises:
            UnknownModelError: there is none.
        """
        able = [served for served in self.served.values() if task in served.pipelines]
        able.sort(key=lambda served: served.first.task != task)  # what was made for it before what can do it, too
        if name is None or name == "":
            if not able:
                raise UnknownModelError(f"no model of this server can do {task}; it serves {self._offers()}")
            return able[0], able[0].pipelines[task]
        if name not in self.served:
            raise UnknownModelError(f"there is no model {name!r}; this server has {listed(sorted(self.served))}")
        served = self.served[name]
        if task not in served.pipelines:
            raise UnknownModelError(
                f"model {name!r} cannot do {task}; it can do {', '.join(served.pipelines)}"
                + (f", and {listed([s.name for s in able])} can" if able else "")
            )
        return served, served.pipelines[task]

    def _offers(self) -> str:
        return ", ".join(sorted({task for served in self.served.values() for task in served.pipelines}))

    def engine(self, pipeline: Pipeline[Any, Any, Any]) -> Engine:
        """The engine of a pipeline's device."""
        device = pipeline.model.device
        with self._lock:
            if device not in self.engines:
                budget = self.options.batch_tokens or _BUDGETS.get(device.type, _BUDGETS["cuda"])
                self.engines[device] = Engine(
                    device,
                    budget,
                    self.options.most_waiting,
                    self.options.tokenizer_threads,
                    self.metrics,
                    self.options.most_cache,
                )
            return self.engines[device]

    @property
    def waiting(self) -> int:
        """Tokens that wait in all engines."""
        return sum(engine.waiting for engine in self.engines.values())

    def close(self) -> None:
        """End the engines."""
        for engine in self.engines.values():
            engine.close()


def open_indexes(options: ServeOptions) -> dict[str, Index]:
    """The indexes that are searched, by name, each with its model loaded.

    Raises:
        InputError: one is no index, or two have the same name.
    """
    found: dict[str, Index] = {}
    for text in options.index:
        name, _, folder = text.rpartition("=") if not Path(text).exists() else ("", "", text)
        name = name or Path(folder).name
        if name in found:
            raise InputError(f"two indexes are called {name!r}; give one of them another NAME=")
        found[name] = open_index(folder, device=_device(options))
        found[name].encoder  # noqa: B018 (loads it)
    return found


def _share(shared: list[SharedEncoder], name: str, made: Pipeline[Any, Any, Any]) -> None:
    """Have a model that was just loaded use an encoder that is there already, if its own is the same."""
    if encoder_of(made.model) is None:
        made.model.optimize_for_inference()
        return
    for one in shared:
        try:
            made.model = one.add(name, made.model)
        except InputError as error:
            logger.debug("%s", error)
        else:
            return
    shared.append(SharedEncoder())
    made.model = shared[-1].add(name, made.model)


def _device(options: ServeOptions) -> torch.device | None:
    given = options.device
    return None if given is None else resolve_device(int(given) if given.isdecimal() else given)


def _wanted(choice: ModelChoice, **kwargs: Any) -> str | None:
    """The task that a model is loaded for: a bare encoder for vectors of texts, others for what their head says."""
    task = task_of(choice.source, kwargs)
    return "sentence-embedding" if task == "feature-extraction" else task
