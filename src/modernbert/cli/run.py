"""`modernbert run` and `embed`: a pipeline on texts from arguments, a file or standard input."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from modernbert.cli.inputs import (
    check_arguments,
    checkpoint_fingerprint,
    fingerprint,
    form_of,
    from_arguments,
    from_records,
    main_of,
    parse_options,
)
from modernbert.cli.messages import InterruptedCommandError, counted, errors_in_flags, flags_of, in_flags, say
from modernbert.errors import InputError, printable

Texts = Annotated[list[str] | None, typer.Argument(help="Texts; without any, --file or standard input.")]
Model = Annotated[str | None, typer.Option(help="Folder or Hub repository; the package's small model if not given.")]
InputFile = Annotated[
    str | None, typer.Option(help="One file: .txt (a line a text), .csv, .tsv, .jsonl, .json or .parquet; FILE#PART.")
]
Column = Annotated[
    list[str] | None, typer.Option(help="Column that holds the text, or FIELD=COLUMN for another field; repeat.")
]
SkipErrors = Annotated[bool, typer.Option("--skip-errors", help="Report inputs that cannot be answered, and go on.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file --output, if it is there.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda:0, or a GPU's index.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")]
Backend = Annotated[str | None, typer.Option("--attn-implementation", help="auto, eager or sdpa.")]
BatchTokens = Annotated[int | None, typer.Option(help="Tokens of a forward pass.")]

_LISTED = 10  # inputs that could not be answered, at the end
# Options in Python -> flags; an option of a task that has no flag of its own goes by --option.
_LOADING = flags_of(
    ("model", "task", "tokenizer", "device", "dtype", "revision", "attn_implementation", "batch_tokens")
)
_FLAGS = _LOADING | flags_of(("overwrite", "column"))


def run(
    texts: Texts = None,
    task: Annotated[str | None, typer.Option(help="What to do with each text; one of those above.")] = None,
    model: Model = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or Hub repository; the model's if not given.")] = None,
    file: InputFile = None,
    column: Column = None,
    output: Annotated[Path | None, typer.Option(help="Write to .jsonl, .csv, .tsv or .parquet; resumes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help='One object a line: {"input": ..., "output": ...}.')] = False,
    top_k: Annotated[int | None, typer.Option(help="How many answers.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="fill-mask: a word to consider; repeat.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="zero-shot-classification: a label; repeat.")] = None,
    question: Annotated[str | None, typer.Option(help="question-answering: of every text.")] = None,
    query: Annotated[str | None, typer.Option(help="text-ranking: the texts are its documents.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="text-generation: tokens to add at the most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="text-generation: below 1 is sharper.")] = None,
    seed: Annotated[int | None, typer.Option(help="text-generation: makes sampling repeatable.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE: any option of the task; repeat.")] = None,
    overwrite: Overwrite = False,
    skip_errors: SkipErrors = False,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    attn_implementation: Backend = None,
    batch_tokens: BatchTokens = None,
) -> None:
    """Run a task on texts: arguments, a file or standard input.

    Tasks: fill-mask (the default without a model), text-classification, zero-shot-classification,
    token-classification (ner), question-answering, multiple-choice (a prompt, then choices), sentence-embedding,
    text-ranking (a query, then documents), feature-extraction, text-generation (which streams to a terminal),
    text-scoring. With a model and no task, the model's own.

    Example: modernbert run "The capital of France is [MASK]."
    """
    from modernbert.pipelines import pipeline

    flags = dict(_FLAGS)
    with errors_in_flags(flags):
        _check(texts, file, output, overwrite, as_json)
        task = "fill-mask" if task is None and model is None else task
        loading = _given(revision=revision, attn_implementation=attn_implementation, batch_tokens=batch_tokens)
        serve = pipeline(task, model, tokenizer, device, dtype, **loading)
    options: dict[str, Any] = parse_options(option or [])
    foreign = sorted(set(options) - set(serve.options))
    if foreign:
        raise InputError(f"{serve.task} has no option {', '.join(foreign)}; there are {', '.join(serve.options)}")
    named: dict[str, Any] = {"top_k": top_k, "targets": target, "candidate_labels": label}
    named |= {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    own = flags_of(named) | {"targets": "--target", "candidate_labels": "--label"}
    given = {name: value for name, value in named.items() if value not in (None, [])}
    for name in given:
        if name not in serve.options:
            raise InputError(f"{own[name]} is no option of {serve.task}")
        if name in options:
            raise InputError(f"{own[name]} and --option {name} are given; give one of them")
    options |= given
    fixed = {name: value for name, value in (("question", question), ("query", query)) if value is not None}
    foreign = sorted(fixed.keys() - {field.name for field in form_of(serve.task)})
    if foreign:
        raise InputError(f"--{foreign[0]} is no option of {serve.task}")
    flags |= {name: f"--option {name}" for name in serve.options} | own
    identity = _identity(model, revision, dtype) | {"tokenizer": tokenizer}
    _answer_all(serve, texts, file, column, fixed, options, output, overwrite, as_json, skip_errors, identity, flags)


def score(
    texts: Texts = None,
    model: Model = None,
    file: InputFile = None,
    column: Column = None,
    output: Annotated[Path | None, typer.Option(help="Write to .jsonl, .csv, .tsv or .parquet; resumes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help='One object a line: {"input": ..., "output": ...}.')] = False,
    stride: Annotated[int | None, typer.Option(help="Long texts: new tokens of each window; half a window.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a window; the model's context.")] = None,
    overwrite: Overwrite = False,
    skip_errors: SkipErrors = False,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    attn_implementation: Backend = None,
    batch_tokens: BatchTokens = None,
) -> None:
    """Say how likely a decoder finds texts, a line each: log-likelihood, perplexity, bits a byte.

    A text over the model's context is read in windows that overlap.

    Example: modernbert score --file pages.jsonl --column text --stride 64
    """
    from modernbert.pipelines import pipeline

    flags = _FLAGS | flags_of(("stride", "max_length"))
    with errors_in_flags(flags):
        _check(texts, file, output, overwrite, as_json)
        loading = _given(revision=revision, attn_implementation=attn_implementation, batch_tokens=batch_tokens)
        serve = pipeline("text-scoring", model, None, device, dtype, **loading)
    options = _given(stride=stride, max_length=max_length)
    identity = _identity(model, revision, dtype)
    _answer_all(serve, texts, file, column, {}, options, output, overwrite, as_json, skip_errors, identity, flags)


def embed(
    output: Annotated[Path, typer.Option(help="Write to .npy (texts x dimensions), .parquet or .jsonl; resumes.")],
    texts: Texts = None,
    model: Model = None,
    file: InputFile = None,
    column: Column = None,
    prompt_name: Annotated[str | None, typer.Option(help="Such as query or document.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to put before each text.")] = None,
    pooling: Annotated[str | None, typer.Option(help="cls, mean, max, last, weighted_mean or mean_sqrt_len.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Vectors of length one.")] = False,
    truncate_dim: Annotated[int | None, typer.Option(help="Keep this many first dimensions.")] = None,
    truncation: Annotated[bool, typer.Option("--truncation", help="Cut texts that are too long.")] = False,
    overwrite: Overwrite = False,
    skip_errors: SkipErrors = False,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    attn_implementation: Backend = None,
    batch_tokens: BatchTokens = None,
) -> None:
    """Write a vector for each text: arguments, a file or standard input.

    With --skip-errors, a text that cannot be embedded has numbers that are NaN in .npy, and none elsewhere.

    Example: modernbert embed --file texts.csv --column body --output vectors.npy
    """
    from modernbert.pipelines import pipeline

    flags = _FLAGS | flags_of(("prompt_name", "prompt", "pooling", "normalize", "truncate_dim", "truncation"))
    with errors_in_flags(flags):
        _check(texts, file, output, overwrite, vectors=True)
        loading = _given(revision=revision, attn_implementation=attn_implementation, batch_tokens=batch_tokens)
        serve = pipeline("sentence-embedding", model, None, device, dtype, **loading)
    options = _given(prompt_name=prompt_name, prompt=prompt, pooling=pooling, truncate_dim=truncate_dim)
    options |= {name: True for name, on in (("normalize", normalize), ("truncation", truncation)) if on}
    identity = _identity(model, revision, dtype)
    _answer_all(serve, texts, file, column, {}, options, output, overwrite, False, skip_errors, identity, flags)


def _given(**values: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def _identity(model: str | None, revision: str | None, dtype: str | None) -> dict[str, Any]:
    """What makes a model another one, for jobs that go on."""
    return {"model": model, "the model's content": checkpoint_fingerprint(model, revision), "dtype": dtype}


def _answer_all(
    serve: Any,
    texts: list[str] | None,
    source: str | None,
    column: list[str] | None,
    fixed: dict[str, Any],
    options: dict[str, Any],
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    skip_errors: bool,
    identity: dict[str, Any],
    flags: dict[str, str],
) -> None:
    """Answer every input, and print or write the answers as they come."""
    from modernbert.io.tables import ResumableOutput, count_records, parse_columns, place_of, read_in_place
    from modernbert.io.tables.writing import as_lists, to_json

    to_people = output is None and not as_json and sys.stdout.isatty()
    if serve.task == "text-generation" and to_people and serve.can_stream(**options):
        serve = Streamed(serve)
    form = form_of(serve.task)
    is_list = main_of(form).many
    with errors_in_flags(flags):
        columns = parse_columns(column or [], form, main_of(form).name)
    file, part = (None, None) if source is None else place_of(source)
    name = source or "standard input"
    inputs: Iterable[tuple[Any, Any]]
    if texts:
        if columns:
            raise InputError("--column is for files and standard input; texts are given as arguments")
        inputs = ((item, None) for item in from_arguments(texts, form, fixed))
        total: int | None = 1 if is_list else len(texts)
    else:
        inputs = from_records(read_in_place(file, part), form, fixed, columns, name, skip_errors)
        total = 1 if is_list and fixed else count_records(file)

    left_out: dict[int, InputError] = {}  # documents of one ranking, by the number of their argument or record
    documents = 0
    where = "argument" if texts else f"{name}, record"
    if serve.task == "text-ranking" and (texts or fixed):

        def ranked(pair: tuple[Any, Any]) -> tuple[Any, Any]:
            nonlocal documents
            item, row = pair
            if isinstance(item, InputError):
                return pair
            found = serve.without_refused(item["query"], item["documents"], **options)
            documents, first = len(found), 1 if fixed else 2
            left_out.update((i, error) for i, error in enumerate(found, first) if isinstance(error, InputError))
            for number, refusal in () if skip_errors else left_out.items():
                raise InputError(f"{where} {number}: {refusal}") from refusal
            return {**item, "documents": found}, row

        inputs = map(ranked, inputs)

    job = {"task": serve.task, **identity, "options": options, **fixed}
    job |= {f"column of {field}": ", ".join(names) for field, names in columns.items()}
    job |= {"the list of texts": texts} if texts else {**fingerprint(file), "part": part}
    answered = failed = done = 0
    failures: dict[int, str] = {}  # the first ones, by their number
    with contextlib.ExitStack() as stack:
        stack.enter_context(errors_in_flags(flags))
        sink = None if output is None else stack.enter_context(ResumableOutput(output, job, overwrite=overwrite))
        if sink is not None and sink.done:
            done, failed, failures = sink.done, sink.failed, dict(sink.errors)
            inputs = sink.rest(inputs, lambda pair: _without_errors(pair[0]))
            say(f"{sink.partial} holds {counted(done, 'answer')}; going on after them")
        waiting: list[tuple[Any, Any]] = []  # inputs whose answers are not there yet
        on_error = "return" if skip_errors else "raise"
        answers = serve.stream(_remembered(inputs, waiting), on_error=on_error, first=done, **options)
        advance = stack.enter_context(_ProgressBar(total, done, quiet=output is None))
        try:
            for answer in answers:
                item, row = waiting.pop(0)
                record: dict[str, Any] = {"input": _without_errors(item)}
                if isinstance(answer, InputError):
                    record["error"] = in_flags(str(answer), flags)
                    failed += 1
                    if len(failures) < _LISTED:
                        failures[done + answered + 1] = record["error"]
                else:
                    record["output"] = answer
                if sink is not None:
                    sink.write(record if row is None else {**record, "row": row})
                elif isinstance(serve, Streamed):
                    pass  # printed as it came
                elif as_json:
                    sys.stdout.write(to_json(record, as_lists) + "\n")
                else:
                    from modernbert.cli.show import show

                    show(item, record.get("output", answer))
                answered += 1
                advance()
        except InputError as error:
            if not waiting or total == len(texts or ()) == 1:  # of the file itself, or the only input that there is
                raise
            raise InputError(f"{where} {done + answered + 1}: {error}") from error
        except KeyboardInterrupt:
            if sink is None or not sink.held():
                raise
            kept = f"{sink.partial} holds {counted(sink.held(), 'answer')}"
            raise InterruptedCommandError(f"interrupted; {kept}, and the same command goes on after them") from None
        if not answered and not done:
            raise InputError(
                "no text: nothing but blank lines, or nothing at all, was given on standard input; give texts as "
                "arguments, with --file, or there"
                if file is None
                else f"no text: {name} holds none"
            )
    if output is not None:
        say(f"{counted(answered + done - failed, 'answer')} in {output}")
    if left_out and not failed:
        for number, refusal in itertools.islice(left_out.items(), _LISTED):
            reason = in_flags(str(refusal), flags)
            say(reason if reason.startswith(name) else f"{where} {number}: {reason}")
        more = f"; the first {_LISTED} are listed above" if len(left_out) > _LISTED else ""
        say(f"{len(left_out)} of {counted(documents, 'document')} could not be ranked{more}")
        raise typer.Exit(1)
    if failed:
        for number, reason in failures.items():
            say(reason if reason.startswith(name) else f"{where} {number}: {reason}")
        more = f"; the first {_LISTED} are listed above" if failed > _LISTED else ""
        say(f"{failed} of {counted(answered + done, 'input')} could not be answered{more}")
        raise typer.Exit(1)


def _without_errors(item: Any) -> Any:
    """An input as it is written: None instead of what could not be read."""
    if isinstance(item, dict) and isinstance(item.get("documents"), list):
        return {**item, "documents": [_without_errors(document) for document in item["documents"]]}
    return None if isinstance(item, InputError) else item


class Streamed:
    """A text-generation pipeline that prints each text as it is generated.

    Args:
        serve: the pipeline.
    """

    task = "text-generation"

    def __init__(self, serve: Any) -> None:
        self.serve = serve

    def stream(self, inputs: Iterable[Any], on_error: str, first: int, **options: Any) -> Iterator[Any]:
        """Print inputs and what follows them; what was printed, or the `InputError` in its place, for each."""
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
            text = item if full else ""
            sys.stdout.write(printable(text, keep="\n\t"))
            for piece in pieces:
                sys.stdout.write(printable(piece, keep="\n\t"))
                sys.stdout.flush()
                text += piece
            sys.stdout.write("\n\n")
            yield text


def _remembered(inputs: Iterable[tuple[Any, Any]], waiting: list[tuple[Any, Any]]) -> Iterator[Any]:
    for pair in inputs:
        waiting.append(pair)
        yield pair[0]


def _check(
    texts: list[str] | None,
    source: str | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool = False,
    vectors: bool = False,
) -> None:
    """Refuse what cannot be read or written before a model is loaded for it."""
    from modernbert.io.tables import check_file, check_output, place_of

    file = None if source is None else place_of(source)[0]
    if texts and file:
        raise InputError("texts are given both as arguments and by --file; give one of them")
    if not texts and file is None and sys.stdin.isatty():
        raise InputError("no text: give it as an argument, with --file, or on standard input")
    check_arguments(texts or [])
    if file is not None and not file.exists():
        raise InputError(f"there is no file {file}")
    if file is not None:
        check_file(file)
    if output is None:
        if overwrite:
            raise InputError("--overwrite is for --output, which is not given")
        return
    if as_json:
        raise InputError("--json prints and --output writes a file; give one of them")
    if output.suffix.lower() == ".npy" and not vectors:
        raise InputError(f"{output}: vectors are written by modernbert embed")
    if file is not None and output.exists() and output.samefile(file):
        raise InputError(f"--output and --file are both {output}; name another output")
    check_output(output, overwrite)


class _ProgressBar:
    """A progress bar on standard error, where that is a terminal, answers go elsewhere, and there is much to do."""

    def __init__(self, total: int | None, done: int, quiet: bool) -> None:
        self.progress: Any = None
        elsewhere = not quiet or not sys.stdout.isatty()
        if sys.stderr.isatty() and elsewhere and (total is None or total > 20):
            from modernbert.pipelines.progress import bar

            self.progress = bar("texts")
            self.task = self.progress.add_task("texts", total=total, completed=done)

    def __enter__(self) -> Any:
        if self.progress is None:
            return lambda: None
        self.progress.start()
        return lambda: self.progress.advance(self.task)

    def __exit__(self, *error: object) -> None:
        if self.progress is not None:
            self.progress.stop()
