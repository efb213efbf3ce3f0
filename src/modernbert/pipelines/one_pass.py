"""Several tasks from one forward pass: models that share an encoder, each with its own head.

Each task makes rows of a text, as its pipeline does by itself. Rows of the same ids are one row, whichever tasks want
it; all of them are packed together, the encoder reads them once, and each head computes from the states of its rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from modernbert.checks import Options, described, option
from modernbert.errors import InputError, listed, shown
from modernbert.models.sharing import SharedEncoder, encoder_of
from modernbert.nn.packing import PackedInputs
from modernbert.pipelines import pipeline
from modernbert.pipelines.base import CPU_BUDGET, GPU_BUDGET, Job, Pipeline, Results, Row, left_plain
from modernbert.pipelines.options import BatchOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnePassOptions(Options):
    """Options of a call."""

    answers: list[str] | None = option(None, "Names of the answers to give.", otherwise="all")
    options: dict | None = option(  # type: ignore[type-arg]
        None, "Options of the tasks' calls: a dict of options by the answer's name.", otherwise="each task's own"
    )


@dataclasses.dataclass(frozen=True)
class Part:
    """What one task makes of a row.

    Attributes:
        name: of the answer.
        place: the row's number among those that the task made of the input.
        row: the task's.
    """

    name: str
    place: int
    row: Row


@dataclasses.dataclass
class SharedRow(Row):
    """Ids that are read once, and what each task makes of them.

    Attributes:
        parts: one a task, or more if a task reads the same twice.
        is_read: whether their results follow from the encoder's usual pass.
    """

    parts: list[Part]
    is_read: bool


Resolved = dict[str, Any]  # the options of each answer that is wanted


class OnePass(Pipeline[Resolved, SharedRow, list[Any]]):
    """Answers of several tasks, of models that share an encoder, from one forward pass.

    Example:
        answers = OnePass({"vector": "runs/search", "words": "runs/splade", "topic": "runs/topics"})
        answers("The rent is due on the first.")["topic"]

    The encoders must hold the same weights, as those of models that were trained with `freeze_layers="all"` from one
    checkpoint, or of one checkpoint with several heads; one copy stays in memory. Each answer has the bits that its own
    pipeline gives. If one of the models is optimized for inference, as pipelines that load a model are, all are from
    then on. A pipeline that was handed over works on by itself, and computes with the shared encoder.

    A call takes a text, a list of texts or an iterable of them. For a text it gives a dict of answers by their names,
    each what its pipeline gives for one text of a list. For a list of texts it gives a dict, too, of what each pipeline
    gives for the list; for an iterable an iterator of dicts. An input may also be a dict with an input of its own for
    each answer, for tasks that read pairs, or spans of a text.

    Texts become the same row for two tasks if these put the same ids around them: a prompt, a prefix or another limit
    of the length makes a row of its own, which is read beside the others in the same pass. Queries of late interaction
    whose tokens do not see what was added have a pass of their own, and queries by static weights need none.

    Args:
        models: by the names of their answers: pipelines, or folders or repositories, or pairs of a task and one of
            these or a loaded model. A list of these is named by their tasks.
        tokenizer: of loaded models.
        batch_tokens, batch_size: as for `pipeline`.
        device, dtype: where to load models, and the dtype of their weights; pipelines stay as they are.
        defaults: options of the calls.

    Attributes:
        pipelines: those of the tasks, by the names of the answers.

    Raises:
        InputError: an encoder differs from the first one; the message says which and how.
        NotFoundError, CheckpointError: a model cannot be loaded.
    """

    task = "one-pass"
    options = OnePassOptions
    auto_model = None
    models = ()
    needs = "models that share an encoder"

    def __init__(
        self,
        models: Mapping[str, Any] | Sequence[Any],
        tokenizer: Any = None,
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        **defaults: Any,
    ) -> None:
        self.pipelines: dict[str, Pipeline[Any, Any, Any]] = {}
        shared, loads = SharedEncoder(), False
        how = {"device": device, "dtype": torch_dtype if dtype is None else dtype}
        try:
            for name, given in _named(models):
                one = given if isinstance(given, Pipeline) else _loaded(name, given, tokenizer, how)
                loads |= not isinstance(given, Pipeline) and _is_place(given)
                name = one.task if name is None else name
                if name in self.pipelines:
                    raise InputError(f"two models are called {name!r}; give a dict with a name for each answer")
                one.model = shared.add(name, one.model)
                self.pipelines[name] = one
        finally:
            shared.finish(frozen=loads)
        if shared.encoder is None:
            raise InputError("there is no model; give at least one, such as {'vector': FOLDER}")
        self.model: Any = shared.encoder
        self.tokenizer = next(iter(self.pipelines.values())).tokenizer
        sizes = BatchOptions(batch_tokens=batch_tokens, batch_size=batch_size)
        self.batch_tokens = sizes.batch_tokens or (CPU_BUDGET if self.model.device.type == "cpu" else GPU_BUDGET)
        self.batch_size = sizes.batch_size
        self.defaults: dict[str, Any] = {}
        self.defaults = self.accepted(defaults)
        self.resolve(self.given({}))

    @classmethod
    def load(cls, model: Any, tokenizer: Any = None, **kwargs: Any) -> Self:
        """The same as the class itself."""
        return cls(model, tokenizer, **kwargs)

    def __getitem__(self, name: str) -> Pipeline[Any, Any, Any]:
        """The pipeline of an answer."""
        return self.pipelines[self._known([name])[0]]

    def __repr__(self) -> str:
        tasks = ", ".join(f"{name}: {one.task}" for name, one in self.pipelines.items())
        config, dtype = self.model.config, str(self.dtype).removeprefix("torch.")
        return f"OnePass({tasks}; dtype={dtype}, device={self.device}, layers={config.num_hidden_layers})"

    def __reduce__(self) -> Any:
        """Copies share an encoder of their own."""
        settings = {"batch_tokens": self.batch_tokens, "batch_size": self.batch_size, **self.defaults}
        return _made_anew, (self.pipelines, settings)

    @property
    def context(self) -> int:
        """Tokens of a text that every task takes."""
        return min(one.context for one in self.pipelines.values())

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Refused: each model has a folder of its own.

        Raises:
            InputError: always; it says how to save a model.
        """
        raise InputError(f"several models are no checkpoint; save one: answers[{next(iter(self.pipelines))!r}]"
                         ".save_pretrained(folder)")  # fmt: skip

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Refused, as `save_pretrained`."""
        self.save_pretrained(repo_id)

    def resolve(self, options: OnePassOptions) -> Resolved:
        """The options of each answer that is wanted."""
        wanted = list(self.pipelines) if options.answers is None else self._known(options.answers)
        given = options.options or {}
        self._known(given)
        if idle := [name for name in given if name not in wanted]:
            raise InputError(f"options has {idle[0]!r}, which is not among the answers {listed(wanted)}")
        resolved = {}
        for name in wanted:
            own, one = given.get(name) or {}, self.pipelines[name]
            if not isinstance(own, Mapping):
                raise InputError(f"options has {shown(own)} for {name!r}; give a dict of options")
            with _of(name):
                resolved[name] = one.resolve(one.given(dict(own)))
        return resolved

    def _known(self, names: Any) -> list[str]:
        if unknown := [name for name in names if name not in self.pipelines]:
            raise InputError(f"there is no answer {shown(unknown[0])}; there are {listed(self.pipelines)}")
        if not (found := list(dict.fromkeys(names))) and not isinstance(names, Mapping):
            raise InputError(f"answers is empty; choose among {listed(self.pipelines)}")
        return found

    def prepare(self, items: list[Any], options: Resolved) -> list[list[SharedRow]]:
        made = {}
        for name, resolved in options.items():
            own = [self._input(item, name, options) for item in items]
            with _of(name):
                made[name] = self.pipelines[name].prepare(own, resolved)
        rows = []
        for number in range(len(items)):
            found: dict[tuple[Any, ...], SharedRow] = {}
            for name, resolved in options.items():
                one = self.pipelines[name]
                for place, row in enumerate(made[name][number]):
                    is_read = one.reads_states(row, resolved)
                    key = (None, *row.ids) if is_read else (name, place)
                    shared = found.setdefault(key, SharedRow(row.ids, [], is_read))
                    shared.parts.append(Part(name, place, row))
            rows.append(list(found.values()))
        return rows

    def _input(self, item: Any, name: str, options: Resolved) -> Any:
        """What a task reads of an input."""
        if not isinstance(item, dict):
            return item
        if name not in item or (unknown := [key for key in item if key not in options]):
            what = f"lacks {name!r}" if name not in item else f"has {shown(unknown[0])}"
            raise InputError(
                f"an input is {described(item)} and {what}; give a text, or a dict with an input for each answer: "
                f"{listed(options)}"
            )
        return item[name]

    def run(self, rows: list[SharedRow], options: Resolved) -> Results[list[Any]]:
        """What each task's own `run` gives for its rows; of each row a result a part."""
        for name in options:
            if encoder_of(self.pipelines[name].model) is not self.model:
                raise InputError(
                    f"the model of {name!r} has another encoder than when it was put together, as after joining other "
                    "models; make the OnePass again"
                )
        read = {tuple(row.ids): row for row in rows if row.is_read}
        states: dict[tuple[int, ...], torch.Tensor] = {}
        if read:
            states_TM = self.model.encode(PackedInputs.of_rows(list(read), self.device)).last_TM
            states = dict(zip(read, states_TM.split([len(ids) for ids in read]), strict=True))
        groups, results = [], []
        for is_read in (True, False):  # passes of their own come last: on a card they may overwrite these states
            for name in options:
                parts = [part for row in rows if row.is_read == is_read for part in row.parts if part.name == name]
                for part in parts if is_read else ():
                    part.row.states = states[tuple(part.row.ids)]
                if parts:
                    results.append(self.pipelines[name].run([part.row for part in parts], options[name]))
                    groups.append(parts)
                for part in parts:
                    part.row.states = None
        if any(callable(one) for one in results):
            return lambda: _by_row(rows, groups, results)
        return _by_row(rows, groups, results)

    def finish(self, job: Job[SharedRow, list[Any]], options: Resolved) -> dict[str, Any]:
        answers = {}
        for name, resolved in options.items():
            found = {
                part.place: (part.row, result)
                for row, results in zip(job.rows, job.results, strict=True)
                for part, result in zip(row.parts, results, strict=True)
                if part.name == name
            }
            own: Job[Any, Any] = Job(self._input(job.item, name, options))
            for place in sorted(found):
                own.rows.append(found[place][0])
                own.results.append(found[place][1])
            answers[name] = self.pipelines[name].finish(own, resolved)
        return answers

    def gather(self, answers: list[Any]) -> Any:
        """What each pipeline gives for a list of texts, with the error of an input that cannot be answered."""
        names = next((list(one) for one in answers if isinstance(one, dict)), list(self.pipelines))
        return {
            name: self.pipelines[name].gather([one[name] if isinstance(one, dict) else one for one in answers])
            for name in names
        }


@contextlib.contextmanager
def _of(name: str) -> Iterator[None]:
    """Say in errors of which answer they are."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _by_row(rows: list[SharedRow], groups: list[list[Part]], given: list[Any]) -> list[list[Any]]:
    results = {}
    for parts, one in zip(groups, given, strict=True):
        got = one() if callable(one) else one
        results.update({id(part): result for part, result in zip(parts, got, strict=True)})
    return [[results[id(part)] for part in row.parts] for row in rows]


def _named(models: Any) -> Iterator[tuple[str | None, Any]]:
    """Models with the names of their answers, which are None where the task gives it."""
    if isinstance(models, Mapping):
        for name, model in models.items():
            if not isinstance(name, str) or not name:
                raise InputError(f"an answer is called {shown(name)}; give it a name, which is a string")
            yield name, model
    elif isinstance(models, list | tuple):
        yield from ((None, model) for model in models)
    else:
        raise InputError(f"models is {described(models)}; give a dict of pipelines or folders by the answers' names")


def _loaded(name: str | None, given: Any, tokenizer: Any, how: dict[str, Any]) -> Pipeline[Any, Any, Any]:
    """A pipeline of what stands for it."""
    task, model = given if isinstance(given, tuple) and len(given) == 2 else (None, given)
    if isinstance(model, Pipeline):
        raise InputError(f"{name or task} names a task beside a pipeline, which has its own; give one of them")
    if not _is_place(given):
        return pipeline(task, model, tokenizer)
    with left_plain():
        return pipeline(task, model, **how)


def _is_place(given: Any) -> bool:
    return isinstance(given[-1] if isinstance(given, tuple) and given else given, str | Path)


def _made_anew(pipelines: dict[str, Any], settings: dict[str, Any]) -> OnePass:
    return OnePass(pipelines, **settings)
