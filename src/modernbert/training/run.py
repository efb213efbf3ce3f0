"""A run from its options to a finished folder: what fine-tuning and pretraining share."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from modernbert.errors import InputError
from modernbert.training.checkpoints import explained
from modernbert.training.contract import Feed, Objective, Outcome
from modernbert.training.distributed import end_together, process
from modernbert.training.engine import fit
from modernbert.training.folder import (
    changes_of,
    check_unchanged,
    opened,
    read_settings,
    settings_before,
    write_settings,
)
from modernbert.training.options import TrainingOptions
from modernbert.training.progress import Reporter, to_stderr
from modernbert.training.report import write_results

logger = logging.getLogger(__name__)
Say = Callable[[str], None]
Kind = TypeVar("Kind", bound=TrainingOptions)


@dataclasses.dataclass(kw_only=True)
class Finished:
    """A finished run.

    Attributes:
        model, tokenizer: what was trained, in evaluation mode, float32.
        outcome: steps, seconds, tokens, and the evaluation.
        output: the run's folder, which `from_pretrained` and `pipeline` load.
    """

    model: Any
    tokenizer: Any
    outcome: Outcome
    output: Path

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics on the held-out data; empty without any."""
        return {} if self.outcome.evaluation is None else self.outcome.evaluation.metrics

    @property
    def figures(self) -> dict[str, float]:
        """The former name of `metrics`."""
        return self.metrics


@dataclasses.dataclass
class Run(Generic[Kind]):
    """A run whose folder is open.

    Attributes:
        name: of its task, or "pretrain".
        options: all of them.
        folder: of the run.
        process: this process among those of the run.
        say: takes a line for the user.
        progress: whether to draw progress.
        resume: whether to continue from the last checkpoint.
        changes: options that were changed since the run began, a line each.
    """

    name: str
    options: Kind
    folder: Path
    process: Any
    say: Say
    progress: bool
    resume: bool
    changes: list[str]

    def fit(self, model: Any, feed: Feed, objective: Objective, shard: bool = False) -> Outcome:
        """Train the model; the run's settings are written once everything is set up."""

        def begin() -> None:
            if self.process.is_main_process:
                write_settings(self.folder, self.name, self.options, self.changes)
            self.process.wait_for_everyone()

        with Reporter(objective.metric, self.progress) as report:
            return fit(
                model, feed, objective, self.options, self.folder,
                resume=self.resume, report=report, begin=begin, shard=shard,
            )  # fmt: skip

    def finish(
        self,
        outcome: Outcome,
        metric: str,
        save: Callable[[], None],
        about: Mapping[str, Any],
        notes: Sequence[str] = (),
    ) -> None:
        """Write the finished model by `save`, then results and report; one process does it for all."""
        if self.process.is_main_process:
            with explained(self.folder):
                save()
                unique = list(dict.fromkeys((*notes, *self.changes)))
                write_results(self.folder, self.name, metric, outcome, self.options, about, unique)


@contextlib.contextmanager
def started(
    name: str,
    kind: type[Kind],
    given: Mapping[str, Any],
    file: str | Path | None,
    *,
    resume: bool,
    progress: bool,
    say: Say | None,
    free: Collection[str],
    libraries: Collection[str] = (),
) -> Iterator[Run[Kind]]:
    """A run with its folder open, for the body of a `with`; at its end all processes wait for each other.

    Options that are given count most, then those of the file, then those of the run to resume.

    Args:
        name: of its task, or "pretrain".
        kind: the class of its options.
        given: options by name; None means not given.
        file: a YAML file of options.
        resume: continue from the last checkpoint in the folder, with its options.
        progress: draw progress on standard error.
        say: takes a line for the user; standard error if not given and progress is drawn, else the log.
        free: names of options that a resumed run may change in silence.
        libraries: what must be installed besides what every run needs.

    Raises:
        InputError: an option is impossible, a library is missing, or the folder is in use or holds something else.
    """
    given = {option: value for option, value in given.items() if value is not None}
    in_file = {} if file is None else read_settings(Path(file), name)
    output = given.get("output", in_file.get("output"))
    before = settings_before(Path(output), name) if resume and output else {}
    in_file = {option: value for option, value in in_file.items() if value is not None or option not in before}
    options = kind.of({**before, **in_file, **given}, name if file is None else str(file))
    if not options.output:
        raise InputError("output is not given; name a folder for the run")
    check_unchanged(Path(options.output), before, options, free)
    folder = Path(options.output).resolve()
    for library in ("accelerate", "jinja2", *libraries):  # what is only needed in the end, too
        if importlib.util.find_spec(library) is None:
            raise InputError(f"training needs {library}: pip install 'modernbert[train]'")
    here = process(options)
    is_main = here.is_main_process
    if say is None:
        say = to_stderr if progress else logger.info
    say = say if is_main else logger.debug
    with opened(folder, resume) if is_main else contextlib.nullcontext():
        here.wait_for_everyone()
        changes = changes_of(folder, name, options, say) if resume and is_main else []
        yield Run(name, options, folder, here, say, progress and is_main, resume, changes)
        end_together(here)
