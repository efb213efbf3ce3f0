"""`modernbert run`, `embed` and `score`: a pipeline on texts from arguments, a file or standard input."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import inspect
import itertools
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from modernbert.checks import OptionField, Options, fields_of, kinds_of, option, parse_values
from modernbert.cli.corpus import are_places, run_corpus
from modernbert.cli.flags import Command, flag, with_signature
from modernbert.cli.inputs import (
    check_arguments,
    checkpoint_fingerprint,
    fingerprint,
    from_arguments,
    from_records,
)
from modernbert.cli.messages import InterruptedCommandError, counted, in_flags, say
from modernbert.corpus.options import CorpusOptions
from modernbert.errors import InputError, printable
from modernbert.io.tables.writing import WRITTEN
from modernbert.pipelines import ALIASES
from modernbert.pipelines.forms import form_of, main_of
from modernbert.pipelines.options import OPTIONS

_LISTED = 10  # inputs that could not be answered, at the end
_FEW = 20  # inputs that need no progress bar
_FORM = "name=value, such as top_k=3"
Pair = tuple[Any, Any]  # an input, and the row that it was read from if that has more than a text


@dataclasses.dataclass(kw_only=True)
class Answering:
    """One call of `run`, `embed` or `score`: texts, and flags that do not depend on the task."""

    texts: list[str] | None = None
    vectors: bool = False  # whether files of vectors may be written
    task: str | None = option(None, "Task, one of those above.", otherwise="the model's own, or fill-mask")
    model: str | None = option(None, "Model, a folder or Hub repository.", otherwise="the package's small model")
    also: list[str] = option(
        [],
        "Also give the answer of this model, [NAME=]FOLDER_OR_REPOSITORY[:TASK], from the same pass; it must share the "
        "encoder of --model, which can then have a name and a task like this.",
        otherwise="none",
    )
    tokenizer: str | None = option(None, "Tokenizer, a folder or Hub repository.", otherwise="the model's")
    file: str | None = option(
        None,
        "File of texts: .txt (one a line), .csv, .tsv, .jsonl, .json or .parquet; FILE#PART reads one of its parts.",
        otherwise="standard input",
    )
    column: list[str] = option([], "Column that holds the text, or FIELD=COLUMN for another field.", otherwise="text")
    output: Path | None = option(
        None, "Write to this .jsonl, .csv, .tsv or .parquet file.", otherwise="standard output"
    )
    as_json: bool = option(False, 'Print one object a line: {"input": ..., "output": ...}.', flag="json")
    question: str | None = option(None, "question-answering: ask this of each text.", otherwise="none")
    query: str | None = option(None, "text-ranking: rank the texts by this query.", otherwise="none")
    options: list[str] = option(
        [], "NAME=VALUE sets any option of the task; VALUE is JSON.", otherwise="none", flag="option"
    )
    overwrite: bool = option(False, "Replace the file --output if it exists.")
    skip_errors: bool = option(False, "Report inputs that cannot be answered, and continue.")
    device: str | None = option(None, "cpu, cuda:0, or the number of a GPU.", otherwise="cpu")
    dtype: str | None = option(
        None, "Type of the weights: auto, float32, bfloat16 or float16.", otherwise="the checkpoint's"
    )
    revision: str | None = option(None, "Branch, tag or commit of the repository.", otherwise="the newest")
    adapter: str | None = option(
        None, "Folder or repository of a LoRA adapter to merge into the model.", otherwise="none"
    )
    attn_implementation: str | None = option(
        None, "Attention: eager, sdpa, native, flash_attention_2 or flex_attention.", otherwise="a fast one"
    )
    batch_tokens: int | None = option(
        None, "Most tokens in a forward pass.", otherwise="4,096 on a CPU, 65,536 on a GPU"
    )

    def __post_init__(self) -> None:
        self.name = self.file or "standard input"
        self.where = "argument" if self.texts else f"{self.name}, record"
        self.fixed = {n: v for n, v in (("question", self.question), ("query", self.query)) if v is not None}

    def run(self, given: dict[str, Any]) -> None:
        """Answer every input with these options of tasks, and print or write the answers as they come."""
        from modernbert.pipelines import pipeline

        self.check()
        task = "fill-mask" if self.task is None and self.model is None else self.task
        loading = {name: getattr(self, name) for name in ("revision", "adapter", "attn_implementation", "batch_tokens")}
        loading = {name: value for name, value in loading.items() if value is not None}
        serve: Any
        if self.also:
            serve = self.together(loading)
        else:
            serve = pipeline(task, self.model, self.tokenizer, self.device, self.dtype, **loading)
        options = self.options_of(serve, given)
        to_people = self.output is None and not self.as_json and sys.stdout.isatty()
        streams = serve.task == "text-generation" and to_people and serve.can_stream(**options)
        self.answer(serve, options, Streamed(serve) if streams else serve)

    def together(self, loading: dict[str, Any]) -> Any:
        """What answers for several models from one pass."""
        from modernbert.pipelines.one_pass import OnePass
        from modernbert.serving.options import ModelChoice

        only = ("task", "tokenizer", "revision", "adapter", "attn_implementation")
        if given := [name for name in only if getattr(self, name) is not None]:
            raise InputError(f"--{given[0].replace('_', '-')} is for one model; with --also give NAME=FOLDER:TASK")
        if self.model is None:
            raise InputError("--also is given without --model, whose encoder it shares")
        choices = [ModelChoice.parse(text) for text in (self.model, *self.also)]
        names = [choice.name for choice in choices]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise InputError(f"two models are called {twice[0]!r}; give one of them another NAME=")
        models = {choice.name: (choice.task, choice.source) if choice.task else choice.source for choice in choices}
        return OnePass(models, device=self.device, dtype=self.dtype, **loading)

    def run_corpus(self, of_corpora: dict[str, Any], given: dict[str, Any]) -> None:
        """Answer the files of folders with these options."""
        if self.file is not None:
            raise InputError("texts are given both as arguments and by --file; give one of them")
        for name in ("as_json", "overwrite"):
            if getattr(self, name):
                raise InputError(f"--{'json' if name == 'as_json' else name} is for texts and files, not for folders")
        loading = {n: getattr(self, n) for n in ("revision", "adapter", "attn_implementation", "batch_tokens")}
        loading |= {n: getattr(self, n) for n in ("task", "model", "tokenizer", "device", "dtype")}
        loading |= {**self.fixed, **of_corpora, "column": self.column}
        named = parse_values(self.options, "--option", _FORM) | {
            n: value for n, value in given.items() if value not in (None, [])
        }
        run_corpus(
            self.texts or [], Path(self.output or ""), {n: v for n, v in loading.items() if v is not None} | named
        )

    def check(self) -> None:
        """Refuse what cannot be read or written before a model is loaded for it."""
        from modernbert.io.tables import check_file, check_output, place_of

        file, output = None if self.file is None else place_of(self.file)[0], self.output
        if self.texts and file:
            raise InputError("texts are given both as arguments and by --file; give one of them")
        if not self.texts and file is None and sys.stdin.isatty():
            raise InputError("no text: give it as an argument, with --file, or on standard input")
        check_arguments(self.texts or [])
        if file is not None and not file.exists():
            raise InputError(f"there is no file {file}")
        if file is not None:
            check_file(file)
        if output is None:
            if self.overwrite:
                raise InputError("--overwrite is for --output, which is not given")
            return
        if self.as_json:
            raise InputError("--json prints and --output writes a file; give one of them")
        if output.suffix.lower() == ".npy" and not self.vectors:
            raise InputError(f"{output}: vectors are written by modernbert embed")
        if file is not None and output.exists() and output.samefile(file):
            raise InputError(f"--output and --file are both {output}; name another output")
        check_output(output, self.overwrite)

    def options_of(self, serve: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The options of the task, from flags and `--option`."""
        flags = {name: f"--{field.flag}" for name, field in _TASKS_OPTIONS.items()}
        flags |= {name: f"--option {name}" for name in kinds_of(serve.options) if name not in flags}
        known = list(kinds_of(serve.options))
        named = {name: value for name, value in given.items() if value not in (None, [])}
        options = parse_values(self.options, "--option", _FORM)
        if foreign := sorted(set(options) - set(known)):
            there = ", ".join(flags[name] for name in known)
            raise InputError(f"{serve.task} has no --option {', --option '.join(foreign)}; there are {there}")
        for name in named:
            if name not in known and self.also:
                raise InputError(
                    f"{flags[name]} is of one task; with --also give it as --option "
                    f'\'options={{"NAME": {{"{name}": ...}}}}\''
                )
            if name not in known:
                raise InputError(f"{flags[name]} is not an option of {serve.task}")
            if name in options:
                raise InputError(f"{flags[name]} and --option {name} are given; give one of them")
        if foreign := [name for name in self.fixed if name not in {field.name for field in form_of(serve.task)}]:
            raise InputError(f"--{foreign[0]} is not an option of {serve.task}")
        return options | named

    def answer(self, serve: Any, options: dict[str, Any], by: Any) -> None:
        """Answer every input with a loaded pipeline, or with what streams its texts."""
        from modernbert.cli.show import show
        from modernbert.io.tables import ResumableOutput
        from modernbert.io.tables.writing import as_lists, to_json
        from modernbert.pipelines.progress import bar

        pairs, total, job = self.inputs(serve.task)
        job |= {"task": serve.task, "model": self.model, "dtype": self.dtype, "tokenizer": self.tokenizer}
        job |= {"the model's content": checkpoint_fingerprint(self.model, self.revision), "options": options}
        if self.also:
            from modernbert.serving.options import ModelChoice

            sources = [ModelChoice.parse(text).source for text in (str(self.model), *self.also)]
            job |= {"also": self.also, "the model's content": [checkpoint_fingerprint(one, None) for one in sources]}
        if self.adapter is not None:
            job |= {"adapter": self.adapter, "the adapter's content": checkpoint_fingerprint(self.adapter, None)}
        tally, refused = Tally("input", "answered"), Tally("document", "ranked")
        if serve.task == "text-ranking" and (self.texts or self.fixed):
            pairs = (self.ranked(serve, pair, options, refused) for pair in pairs)
        with contextlib.ExitStack() as stack:
            sink = None
            if self.output is not None:
                sink = stack.enter_context(ResumableOutput(self.output, job, overwrite=self.overwrite))
            if sink is not None and sink.done:
                tally.total, tally.failed, tally.reasons = sink.done, sink.failed, dict(sink.errors)
                pairs = sink.rest(pairs, lambda pair: _without_errors(pair[0]))
                say(f"{sink.partial} holds {counted(sink.done, 'answer')}; continuing after them")
            waiting: collections.deque[Pair] = collections.deque()  # inputs whose answers are not there yet
            on_error = "return" if self.skip_errors else "raise"
            answers = by.stream(_remembered(pairs, waiting), on_error=on_error, first=tally.total, **options)
            progress = bar("texts")
            elsewhere = self.output is not None or not sys.stdout.isatty()
            progress.disable = not (sys.stderr.isatty() and elsewhere and (total is None or total > _FEW))
            stack.enter_context(progress)
            drawn = progress.add_task("texts", total=total, completed=tally.total)
            try:
                for answer in answers:
                    item, row = waiting.popleft()
                    tally.total += 1
                    record = {"input": _without_errors(item), "output": answer}
                    if isinstance(answer, InputError):
                        tally.fail(tally.total, answer)
                        record = {"input": record["input"], "error": in_flags(str(answer))}
                    if sink is not None:
                        sink.write(record if row is None else {**record, "row": row})
                    elif self.as_json:
                        sys.stdout.write(to_json(record, as_lists) + "\n")
                    elif self.also and not isinstance(answer, InputError):
                        for name, one in answer.items():
                            show(f"{name}: {item}", one)
                    elif by is serve:
                        show(item, answer)
                    progress.advance(drawn)
            except InputError as error:
                if not waiting or total == len(self.texts or ()) == 1:  # of the file, or the only input that there is
                    raise
                raise InputError(f"{self.where} {tally.total + 1}: {error}") from error
            except KeyboardInterrupt:
                if sink is None or not sink.held():
                    raise
                kept = f"{sink.partial} holds {counted(sink.held(), 'answer')}"
                raise InterruptedCommandError(
                    f"interrupted; {kept}, and the same command continues after them"
                ) from None
            if not tally.total:
                raise InputError(
                    f"no text: {self.name} holds none"
                    if self.file
                    else "no text: standard input is empty or blank; give texts as arguments or with --file"
                )
        if self.output is not None:
            say(f"{counted(tally.total - tally.failed, 'answer')} in {self.output}")
        (tally if tally.failed else refused).report(self.where, self.name)

    def inputs(self, task: str) -> tuple[Iterable[Pair], int | None, dict[str, Any]]:
        """The inputs, how many there are if that is known, and what tells them from those of another job."""
        from modernbert.io.tables import count_records, parse_columns, place_of, read_in_place

        form = form_of(task)
        main = main_of(form)
        columns = parse_columns(self.column, form, main.name)
        if self.texts:
            if columns:
                raise InputError("--column is for files and standard input; texts are given as arguments")
            pairs: Iterable[Pair] = ((item, None) for item in from_arguments(self.texts, form, self.fixed))
            return pairs, 1 if main.many else len(self.texts), {"the list of texts": self.texts, **self.fixed}
        file, part = (None, None) if self.file is None else place_of(self.file)
        pairs = from_records(read_in_place(file, part), form, self.fixed, columns, self.name, self.skip_errors)
        total = 1 if main.many and self.fixed else count_records(file)
        named = {f"column of {field}": ", ".join(names) for field, names in columns.items()}
        return pairs, total, {**fingerprint(file), "part": part, **named, **self.fixed}

    def ranked(self, serve: Any, pair: Pair, options: dict[str, Any], refused: Tally) -> Pair:
        """An input whose documents each stand for themselves: errors instead of those that cannot be ranked."""
        item, row = pair
        if isinstance(item, InputError):
            return pair
        documents = serve.without_refused(item["query"], item["documents"], **options)
        refused.total = len(documents)
        for number, document in enumerate(documents, 1 if self.fixed else 2):
            if isinstance(document, InputError):
                if not self.skip_errors:
                    raise InputError(f"{self.where} {number}: {document}") from document
                refused.fail(number, document)
        return {**item, "documents": documents}, row


@dataclasses.dataclass
class Tally:
    """How many inputs or documents there were, and the first of those that failed, by their number."""

    noun: str
    participle: str
    total: int = 0
    failed: int = 0
    reasons: dict[int, str] = dataclasses.field(default_factory=dict)

    def fail(self, number: int, error: InputError) -> None:
        self.failed += 1
        if len(self.reasons) < _LISTED:
            self.reasons[number] = in_flags(str(error))

    def report(self, where: str, name: str) -> None:
        """Say what failed, and end the command with exit code 1, if anything did."""
        if not self.failed:
            return
        for number, reason in self.reasons.items():
            say(reason if reason.startswith(name) else f"{where} {number}: {reason}")
        more = f"; the first {_LISTED} are listed above" if self.failed > _LISTED else ""
        say(f"{self.failed} of {counted(self.total, self.noun)} could not be {self.participle}{more}")
        raise typer.Exit(1)


class Streamed:
    """A text-generation pipeline that prints each text as it is generated."""

    def __init__(self, serve: Any) -> None:
        self.serve = serve

    def stream(self, inputs: Iterable[Any], on_error: str, first: int, **options: Any) -> Iterator[Any]:
        """Print inputs and what continues them; what was printed, or the `InputError` instead, for each."""
        full = options.get("return_full_text", True) is not False
        for number, item in enumerate(inputs, first):
            try:
                if isinstance(item, InputError):
                    raise item
                pieces = self.serve.pieces(item, number, **options)
            except InputError as error:
                if on_error == "raise":
                    raise
                sys.stdout.write(f"not answered: {printable(str(error))}\n\n")
                yield error
                continue
            text = ""
            for piece in itertools.chain([item] if full else [], pieces):
                sys.stdout.write(printable(piece, keep="\n\t"))
                sys.stdout.flush()
                text += piece
            sys.stdout.write("\n\n")
            yield text


def _remembered(pairs: Iterable[Pair], waiting: collections.deque[Pair]) -> Iterator[Any]:
    for pair in pairs:
        waiting.append(pair)
        yield pair[0]


def _without_errors(item: Any) -> Any:
    """An input as it is written: None instead of what could not be read."""
    if isinstance(item, dict) and isinstance(item.get("documents"), list):
        return {**item, "documents": [_without_errors(document) for document in item["documents"]]}
    return None if isinstance(item, InputError) else item


# The commands


class TaskCommand(Command):
    """`run`, whose help shows the options of the task that is named beside it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = [word for argument in args for word in argument.split("=", 1)]
        task = dict(itertools.pairwise(words)).get("--task", "")
        options = OPTIONS.get(ALIASES.get(task, task))
        if options is not None:
            own = {field.name: said for field, said in _flagged(options)}
            for parameter in typing.cast(list[Any], self.params):
                if parameter.name in _TASKS_OPTIONS:
                    parameter.hidden = parameter.name not in own
                    parameter.help = own.get(parameter.name)
        return super().parse_args(ctx, args)


_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_TEXTS_HELP = "Texts; or folders, globs and files of a corpus. (default: --file, or else standard input)"
_TEXTS = Annotated[list[str] | None, typer.Argument(help=_TEXTS_HELP)]
_VECTORS = Annotated[
    Path, typer.Option(help="Write to this .npy (texts x dimensions), .parquet or .jsonl, or a corpus to this folder.")
]


def _command(doc: str, task: str | None, own: list[inspect.Parameter], without: tuple[str, ...]) -> Callable[..., None]:
    """A command on texts; its flags are the fields of `Answering` and options of its own."""
    corpora = {field.name: field for field in fields_of(CorpusOptions) if field.name != "column"}
    if task == "text-scoring":
        corpora = {}
    shared = [field for field in fields_of(Answering) if field.name not in ("texts", "vectors", *without)]

    def run(**given: Any) -> None:
        of_corpora = {name: value for name in corpora if (value := given.pop(name)) not in (None, [], False)}
        names = [field.name for field in fields_of(Answering) if field.name in given]
        common = {name: value for name in names if (value := given.pop(name)) is not None}
        answering = Answering(**{"task": task, **common}, vectors=task == "sentence-embedding")
        if are_places(answering.texts, answering.output, list(WRITTEN)):
            answering.run_corpus(of_corpora, given)
        elif of_corpora:
            raise InputError(
                f"--{next(iter(of_corpora)).replace('_', '-')} is for folders, globs and files given as arguments, "
                "with a folder as --output"
            )
        else:
            answering.run(given)

    texts = inspect.Parameter("texts", _KEYWORD, default=None, annotation=_TEXTS)
    return with_signature(run, [texts, *map(flag, shared), *own, *map(flag, corpora.values())], doc)


def _flagged(options: type[Options]) -> list[tuple[OptionField, str]]:
    """A task's options and their help; those that are no values of one kind have no flag."""
    unfit = {dict[str, Any], Any, tuple[tuple[int, ...], ...]}
    fields = [field for field in fields_of(options) if not unfit.intersection(field.kinds)]
    flags = {name: f"--option {name}" for name in kinds_of(options)} | {f.name: f"--{f.flag}" for f in fields}
    return [(f, in_flags(f.described, flags)) for f in fields]


def _flags(task: str) -> list[inspect.Parameter]:
    return [flag(field, said) for field, said in _flagged(OPTIONS[task])]


# The options that `run` shows if no task is named; every other one has a hidden flag.
_USUAL = {
    "top_k": "Number of answers. (default: fill-mask 5, text-ranking all, others 1)",
    "targets": "fill-mask: consider only this word. (default: all words)",
    "candidate_labels": "zero-shot-classification: a label to choose from. (required)",
    "max_new_tokens": "text-generation: most tokens to generate. (default: 256)",
    "temperature": "text-generation: lower values choose likelier tokens. (default: 0.7)",
    "seed": "text-generation: random seed, which makes texts repeatable. (default: none)",
}
_TASKS_OPTIONS = {field.name: field for options in OPTIONS.values() for field, _ in _flagged(options)}

run = _command(
    """Run a task on texts from arguments, a file or standard input.

    Tasks: fill-mask (the default without a model), text-classification, zero-shot-classification,
    token-classification (ner), question-answering, multiple-choice (a prompt, then choices), sentence-embedding,
    sparse-embedding, late-interaction, text-ranking (a query, then documents), feature-extraction, text-generation
    (which streams to a terminal), text-scoring. With a model, the default is the task that it was trained for.
    `modernbert run --task TASK --help` lists the options of a task. An interrupted command that has --output continues
    where it was when it is run again.

    Folders, globs and files as arguments, with a folder as --output, are a corpus: distinct texts are answered once,
    into shards of Parquet.

    Example: modernbert run "The capital of France is [MASK]."
    """,
    None,
    [flag(field, _USUAL.get(name), hidden=name not in _USUAL) for name, field in _TASKS_OPTIONS.items()],
    (),
)
score = _command(
    """Score texts by a decoder: log-likelihood (natural logarithm), tokens, perplexity per token, bits per byte.

    A text that is longer than the model's context is read in windows that overlap.

    Example: modernbert score --file pages.jsonl --column text --stride 64
    """,
    "text-scoring",
    _flags("text-scoring"),
    ("task", "also", "tokenizer", "question", "query", "options"),
)
embed = _command(
    """Write a vector for each text, from arguments, a file or standard input.

    Folders, globs and files as arguments, with a folder as --output, are a corpus: distinct texts are computed once,
    into shards of Parquet, and an interrupted command continues when it is run again.

    With --skip-errors, a text that cannot be embedded gets NaN in .npy, and its error message in other files.

    Example: modernbert embed --file texts.csv --column body --output vectors.npy
    """,
    "sentence-embedding",
    [inspect.Parameter("output", _KEYWORD, annotation=_VECTORS), *_flags("sentence-embedding")],
    ("task", "also", "tokenizer", "question", "query", "options", "as_json", "output"),
)
