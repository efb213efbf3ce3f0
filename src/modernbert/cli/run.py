"""`modernbert run` and `embed`: a pipeline on texts from arguments, a file or standard input."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from modernbert.cli.inputs import (
    checkpoint_fingerprint,
    fingerprint,
    form_of,
    from_arguments,
    from_records,
    parse_columns,
    parse_options,
)
from modernbert.errors import InputError

Texts = Annotated[list[str] | None, typer.Argument(help="Texts; without any, --file or standard input.")]
Model = Annotated[str | None, typer.Option(help="Folder or Hub repository; the package's small model if not given.")]
InputFile = Annotated[Path | None, typer.Option(help="File: .txt, .csv, .tsv, .jsonl or .parquet.")]
Column = Annotated[
    list[str] | None, typer.Option(help="Column that holds the text, or FIELD=COLUMN for another field; repeat.")
]
SkipErrors = Annotated[bool, typer.Option("--skip-errors", help="Report inputs that cannot be answered, and go on.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda:0, or a GPU's index.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")]
Backend = Annotated[str | None, typer.Option("--attn-implementation", help="auto, eager or sdpa.")]
BatchTokens = Annotated[int | None, typer.Option(help="Tokens of a forward pass.")]


def run(
    texts: Texts = None,
    task: Annotated[str | None, typer.Option(help="What to do with each text; see below.")] = None,
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

    _check_source(texts, file)
    if output is not None and output.suffix.lower() == ".npy":
        raise InputError(f"{output}: vectors are written by modernbert embed")
    if output is not None and as_json:
        raise InputError("--json prints and --output writes a file; give one of them")
    task = "fill-mask" if task is None and model is None else task
    loading = _given(revision=revision, attn_implementation=attn_implementation, batch_tokens=batch_tokens)
    serve = pipeline(task, model, tokenizer, device, dtype, **loading)
    options: dict[str, Any] = parse_options(option or [])
    foreign = sorted(set(options) - set(serve.options))
    if foreign:
        raise InputError(f"{serve.task} has no option {', '.join(foreign)}; there are {', '.join(serve.options)}")
    named: dict[str, Any] = {"top_k": top_k, "targets": target, "candidate_labels": label}
    named |= {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    options |= {name: value for name, value in named.items() if value not in (None, [])}
    fixed = {name: value for name, value in (("question", question), ("query", query)) if value is not None}
    foreign = [name for name in fixed if name not in form_of(serve.task).fields]
    if foreign:
        raise InputError(f"--{foreign[0]} is no option of {serve.task}")
    identity = [model, checkpoint_fingerprint(model, revision), tokenizer, dtype]
    _answer_all(serve, texts, file, column, fixed, options, output, as_json, skip_errors, identity)


def score(
    texts: Texts = None,
    model: Model = None,
    file: InputFile = None,
    column: Column = None,
    output: Annotated[Path | None, typer.Option(help="Write to .jsonl, .csv, .tsv or .parquet; resumes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help='One object a line: {"input": ..., "output": ...}.')] = False,
    stride: Annotated[int | None, typer.Option(help="Long texts: new tokens of each window; half a window.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a window; the model's context.")] = None,
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

    _check_source(texts, file)
    if output is not None and as_json:
        raise InputError("--json prints and --output writes a file; give one of them")
    loading = _given(revision=revision, attn_implementation=attn_implementation, batch_tokens=batch_tokens)
    serve = pipeline("text-scoring", model, None, device, dtype, **loading)
    options = _given(stride=stride, max_length=max_length)
    identity = [model, checkpoint_fingerprint(model, revision), dtype]
    _answer_all(serve, texts, file, column, {}, options, output, as_json, skip_errors, identity)


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

    _check_source(texts, file)
    loading = _given(revision=revision, attn_implementation=attn_implementation, batch_tokens=batch_tokens)
    serve = pipeline("sentence-embedding", model, None, device, dtype, **loading)
    options = _given(prompt_name=prompt_name, prompt=prompt, pooling=pooling, truncate_dim=truncate_dim)
    options |= {name: True for name, on in (("normalize", normalize), ("truncation", truncation)) if on}
    identity = [model, checkpoint_fingerprint(model, revision), dtype]
    _answer_all(serve, texts, file, column, {}, options, output, False, skip_errors, identity)


def _given(**values: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def _answer_all(
    serve: Any,
    texts: list[str] | None,
    file: Path | None,
    column: list[str] | None,
    fixed: dict[str, Any],
    options: dict[str, Any],
    output: Path | None,
    as_json: bool,
    skip_errors: bool,
    identity: list[Any],
) -> None:
    """Answer every input, and print or write the answers as they come."""
    from modernbert.records import ResumableOutput, count_records, read_records

    to_people = output is None and not as_json and sys.stdout.isatty()
    if serve.task == "text-generation" and to_people and serve.can_stream(**options):
        serve = Streamed(serve)
    form = form_of(serve.task)
    columns = parse_columns(column or [], form)
    name = str(file) if file else "standard input"
    inputs: Iterable[tuple[Any, Any]]
    if texts:
        if columns:
            raise InputError("--column is for files and standard input; texts are given as arguments")
        inputs = ((item, None) for item in from_arguments(texts, form, fixed))
        total: int | None = len(texts) if form.many is None else 1
    else:
        if output is not None and file is not None and output.exists() and output.samefile(file):
            raise InputError(f"--output and --file are both {output}; name another output")
        inputs = from_records(read_records(file, skip_errors), form, fixed, columns, name)
        total = count_records(file) if form.many is None or len(fixed) == 0 else 1

    job = {"task": serve.task, "checkpoint": identity, "options": options, "fields": fixed, "columns": columns}
    job |= {"input": texts or fingerprint(file)}
    answered = failed = 0
    with contextlib.ExitStack() as stack:
        sink = None if output is None else stack.enter_context(ResumableOutput(output, job))
        done = 0
        if sink is not None:
            done, failed = sink.done, sink.failed
            inputs = sink.rest(inputs, lambda pair: None if isinstance(pair[0], InputError) else pair[0])
        if sink is not None and done:
            sys.stderr.write(f"modernbert: {sink.partial} holds {done} answers; going on after them\n")
        waiting: list[tuple[Any, Any]] = []  # inputs whose answers are not there yet
        on_error = "return" if skip_errors else "raise"
        answers = serve.stream(_remembered(inputs, waiting), on_error=on_error, first=done, **options)
        advance = stack.enter_context(_ProgressBar(total, done, quiet=output is None))
        try:
            for answer in answers:
                item, row = waiting.pop(0)
                record: dict[str, Any] = {"input": None if isinstance(item, InputError) else item}
                record |= {"error": str(answer)} if isinstance(answer, InputError) else {"output": answer}
                if sink is not None:
                    sink.write(record if row is None else {**record, "row": row})
                elif isinstance(serve, Streamed):
                    pass  # printed as it came
                elif as_json:
                    sys.stdout.write(json.dumps(record, ensure_ascii=False, default=_listed) + "\n")
                else:
                    from modernbert.cli.show import show

                    show(item, answer)
                answered += 1
                failed += "error" in record
                advance()
        except InputError as error:
            if not waiting or not (file or answered):  # of the file itself, or the only input that there is
                raise
            raise InputError(f"{name}, record {done + answered + 1}: {error}") from error
        if not answered and not done:
            raise InputError("no text: every line was empty" if file is None else f"no text: {file} holds none")
    if output is not None:
        sys.stderr.write(f"modernbert: {answered + done} answers in {output}\n")
    if failed:
        sys.stderr.write(f"modernbert: {failed} of {answered + done} inputs could not be answered\n")
        raise typer.Exit(1)


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
                sys.stdout.write(f"not answered: {error}\n\n")
                yield error
                continue
            text = item if full else ""
            sys.stdout.write(text)
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
                text += piece
            sys.stdout.write("\n\n")
            yield text


def _remembered(inputs: Iterable[tuple[Any, Any]], waiting: list[tuple[Any, Any]]) -> Iterator[Any]:
    for pair in inputs:
        waiting.append(pair)
        yield pair[0]


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _check_source(texts: list[str] | None, file: Path | None) -> None:
    """Refuse what cannot be read before a model is loaded for it."""
    if texts and file:
        raise InputError("texts are given both as arguments and by --file; give one of them")
    if not texts and file is None and sys.stdin.isatty():
        raise InputError("no text: give it as an argument, with --file, or on standard input")
    if file is not None and not file.exists():
        raise InputError(f"there is no file {file}")


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
