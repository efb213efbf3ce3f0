"""What every pipeline does: load, tokenize, pack to a token budget, run, and give answers in order.

An input becomes a `Job` of one or more rows of ids. Rows of many jobs are sorted by length in a look-ahead window and
packed together up to a token budget; when a job's rows have their results, the task makes its answer of them.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import itertools
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from tokenizers import Encoding

from modernbert.auto import TRAINED_HEADS, architectures_of, kind_of
from modernbert.engines.guard import is_frozen
from modernbert.errors import InputError, listed, shown
from modernbert.io.hub import Source
from modernbert.models.placement import resolve_device, resolve_dtype
from modernbert.nn.packing import PackedInputs
from modernbert.pipelines.checks import check_count, check_iterable, check_text, short, watched
from modernbert.pipelines.progress import progress_bar
from modernbert.text.encoding import TRUNCATIONS, UNLIMITED
from modernbert.text.tokenizer import Tokenizer

_LOADING = ("attn_implementation", "device_map", "quantization_config")
_PLACES = ("revision", "subfolder", "cache_dir", "token", "local_files_only")
_LOOK_AHEAD = 4096  # inputs that are sorted by length together, at the most
_BUDGETS = 8  # forward passes that a window is enough for
_TOKENIZED_TOGETHER = 64
_PINNED = 2**26  # bytes of pinned memory that a batch's results may stay in
_CPU_BUDGET, _GPU_BUDGET = 4096, 65536  # tokens of a forward pass


Results = Sequence[Any] | Callable[[], Sequence[Any]]  # one a row


class Row(NamedTuple):
    """One row of ids, and what its result needs to know about it."""

    ids: Sequence[int]
    extra: Any = None
    number: int = 0  # of its input in the stream


@dataclasses.dataclass
class Job:
    """One input on its way through the model.

    Attributes:
        rows: what the model sees of it.
        context: what its answer needs besides.
        number: of the input in its stream, those that cannot be answered counted too.
        results: one a row, filled in as batches are run.
        error: why it cannot be answered, where it cannot.
    """

    rows: list[Row]
    context: Any = None
    number: int = 0
    results: list[Any] = dataclasses.field(default_factory=list)
    error: InputError | None = None


class Pipeline(abc.ABC):
    """A model and its tokenizer, ready for texts.

    Args:
        model: a loaded model; it is put in evaluation mode.
        tokenizer: its tokenizer.
        batch_tokens: tokens of a forward pass, all its texts together; None leaves it to the device.
        batch_size: rows of a forward pass at the most; None leaves it to `batch_tokens`.
        defaults: options of the task's calls.
    """

    task: ClassVar[str]
    auto_model: ClassVar[Any]  # the class that loads its models
    options: ClassVar[tuple[str, ...]] = ()
    architecture: ClassVar[str | None] = "encoder"  # what its models are; None where either kind serves
    needs: ClassVar[str] = "an encoder"  # the same for messages

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        **defaults: Any,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        for name, value in (("batch_tokens", batch_tokens), ("batch_size", batch_size)):
            if value is not None:
                check_count(name, value)
        self.batch_tokens = batch_tokens or (_CPU_BUDGET if model.device.type == "cpu" else _GPU_BUDGET)
        self.batch_size = batch_size
        self.defaults = self._checked(defaults)

    @classmethod
    def load(cls, model: Any, tokenizer: Any = None, *, device: Any = None, dtype: Any = None, **kwargs: Any) -> Self:
        """Load what is not loaded yet, make it ready to serve, and make a pipeline of it."""
        places = {k: kwargs.pop(k) for k in _PLACES if k in kwargs}
        loading = {k: kwargs.pop(k) for k in _LOADING if k in kwargs}
        if isinstance(model, str | Path):
            tokenizer = model if tokenizer is None else tokenizer
            cls._check_architecture(model, places)
            model = cls.auto_model.from_pretrained(model, device=device, dtype=dtype, **places, **loading)
            model.optimize_for_inference()
        elif tokenizer is None:
            raise InputError("model is loaded already, so its tokenizer cannot be guessed; give tokenizer=")
        else:
            if loading:
                raise InputError(f"{', '.join(loading)} is for loading, and model is loaded already")
            if device is not None:
                model.to(resolve_device(device))
            if dtype is not None:
                model.to(resolve_dtype(dtype, model.dtype, model.device))
        if isinstance(tokenizer, str | Path):
            tokenizer = Tokenizer.from_pretrained(tokenizer, **places)
        made = cls(model, tokenizer, **kwargs)
        if made.defaults:
            with torch.random.fork_rng(devices=[]):  # a task may draw a seed
                made.check_defaults()
        return made

    @classmethod
    def _check_architecture(cls, model: str | Path, places: dict[str, Any]) -> None:
        """Refuse an encoder where a decoder is needed, and the reverse, and the head of another task."""
        source = Source.pop_from(model, dict(places))
        if source.find("config.json") is None:
            return
        values = source.read_json("config.json")
        said = f"{values.get('model_type') or ''} {values.get('architectures') or ''}".lower()
        wrong = "modernbert" in said and ("decoder" in said) != (cls.architecture == "decoder")
        if cls.architecture is not None and wrong:
            found = "an encoder" if cls.architecture == "decoder" else "a decoder"
            raise InputError(f"{cls.task} needs {cls.needs}; {model} is {found}")
        wanted, found = getattr(cls.auto_model, "kind", "base"), kind_of(values) or "base"
        if wanted not in ("base", found) and found in TRAINED_HEADS:
            raise InputError(
                f"{cls.task} needs a model with a head for {wanted}; {model} has one for {found} "
                f"({listed(architectures_of(values))})"
            )

    def __reduce__(self) -> Any:
        """Copies, and pipelines in other processes, hold the same weights laid out anew, and give the same bits.

        Weights travel as bytes: a process that was spawned cannot take over the memory of this one.
        """
        return _unpickled, (type(self), pickle.dumps(self.__dict__), is_frozen(self.model))

    # Inputs in, answers out

    def __call__(self, inputs: Any, *, on_error: str = "raise", progress: bool = False, **options: Any) -> Any:
        """Answer one input, or a list of inputs by a list, or any other iterable by an iterator.

        A text is taken as it is: the line end of a file's line is a part of it, unless the caller takes it off.

        Args:
            inputs: what the task takes.
            on_error: "raise" stops at the first input that cannot be answered, after the answers before it; "return"
                gives the `InputError` in the place of its answer and goes on.
            progress: draw a progress bar on standard error.
            options: the task's own.

        Raises:
            InputError: an input or an option cannot be served.
        """
        settings = {"on_error": on_error, "progress": progress, **options}
        if self.is_one(inputs, options):
            return next(self.stream([inputs], **settings))
        if isinstance(inputs, list | tuple):
            if not inputs:
                raise InputError("inputs is an empty list; give at least one")
            return self.gather(list(self.stream(inputs, **settings)))
        return self.stream(watched(check_iterable("inputs", inputs)), **settings)

    def is_one(self, inputs: Any, options: dict[str, Any]) -> bool:
        """Whether this is one input, not several."""
        return isinstance(inputs, str | dict)

    def gather(self, answers: list[Any]) -> Any:
        """What a list of inputs is answered by."""
        return answers

    def stream(
        self, inputs: Iterable[Any], *, on_error: str = "raise", progress: bool = False, first: int = 0, **options: Any
    ) -> Iterator[Any]:
        """Answers of inputs, in their order, as they come; memory does not grow with their number.

        Arguments as those of a call, and `first`, the number of the first input where these go on with others.
        """
        if on_error not in ("raise", "return"):
            raise InputError(f"on_error is {shown(on_error)}; choose raise or return")
        settings = self.settle({**self.defaults, **self._checked(options)})
        inputs = inputs if isinstance(inputs, list | tuple) else check_iterable("inputs", inputs)
        answers = self._stream(inputs, settings, on_error == "return", itertools.count(first))
        total = len(inputs) if isinstance(inputs, list | tuple) else None
        return progress_bar(answers, total, self.task) if progress else answers

    def _stream(
        self, inputs: Iterable[Any], settings: dict[str, Any], go_on: bool, numbers: Iterator[int]
    ) -> Iterator[Any]:
        iterator = iter(inputs)
        broken: Exception | None = None
        while broken is None:
            window, broken = self._window(iterator, settings, go_on, numbers)
            if not window and broken is None:
                return
            self._run(window, settings)
            while window:
                job = window.popleft()
                if job.error is None:
                    yield self.finish(job, settings)
                elif go_on:
                    yield job.error
                else:
                    raise job.error
        raise broken

    def _window(
        self, iterator: Iterator[Any], settings: dict[str, Any], go_on: bool, numbers: Iterator[int]
    ) -> tuple[collections.deque[Job], Exception | None]:
        """The next jobs, enough for several forward passes; up to an error where it ends the stream.

        The second value is what the inputs' own iterator raised; what it gave before is answered first.
        """
        window: collections.deque[Job] = collections.deque()
        tokens = 0
        while len(window) < _LOOK_AHEAD and tokens < _BUDGETS * self.batch_tokens:
            items: list[Any] = []
            broken: Exception | None = None
            try:
                for item in itertools.islice(iterator, _TOKENIZED_TOGETHER):
                    items.append(item)
            except Exception as error:
                broken = error
            for job in self._prepared(items, settings) if items else ():
                job.number = next(numbers)
                window.append(job)
                tokens += sum(self.weight(row) for row in job.rows)
                if job.error is not None and not go_on:
                    return window, None
            if broken is not None or not items:
                return window, broken
        return window, None

    def _prepared(self, items: list[Any], settings: dict[str, Any]) -> list[Job]:
        if len(items) == 1 and isinstance(items[0], InputError):  # of whoever made the inputs
            return [Job([], error=items[0])]
        try:
            if not any(isinstance(item, InputError) for item in items):
                return self.prepare(items, settings)
        except InputError as error:
            if len(items) == 1:
                return [Job([], error=error)]
        return [job for item in items for job in self._prepared([item], settings)]

    def _run(self, window: collections.deque[Job], settings: dict[str, Any]) -> None:
        rows = [(job, i) for job in window for i in range(len(job.rows))]
        for job in window:
            job.results = [None] * len(job.rows)
        begun: list[tuple[list[tuple[Job, int]], Results]] = []
        for batch in self._batches([self.weight(job.rows[i]) for job, i in rows]):
            chosen = [rows[k] for k in batch]
            with torch.inference_mode():
                results = self.run([job.rows[i]._replace(number=job.number) for job, i in chosen], settings)
            begun.append((chosen, results))
            if len(begun) > 1:  # a card computes this batch while the one before is read, and the next one is packed
                _keep(*begun.pop(0))
        for chosen, results in begun:
            _keep(chosen, results)

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Numbers of rows, long rows first, as many together as the token budget holds, in batches of like size."""
        total = sum(lengths)
        budget = math.ceil(total / math.ceil(total / self.batch_tokens)) if total else 1
        batch: list[int] = []
        tokens = 0
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            full = tokens >= budget or tokens + lengths[i] > self.batch_tokens or len(batch) == self.batch_size
            if batch and full:
                yield batch
                batch, tokens = [], 0
            batch.append(i)
            tokens += lengths[i]
        if batch:
            yield batch

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            sizes = [name for name in unknown if name in ("batch_size", "batch_tokens")]
            hint = f"; {' and '.join(sizes)} can be given to pipeline() when it is made" if sizes else ""
            there = ", ".join(self.options)
            raise InputError(f"{self.task} has no option {', '.join(unknown)}; there are {there}{hint}")
        return options

    # What a task says

    def settle(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Check the options of a call and fill in the others; raises `InputError`."""
        return settings

    def check_defaults(self) -> None:
        """Check the options that were given when the pipeline was made; raises `InputError`."""
        self.settle(self.defaults)

    def weight(self, row: Row) -> int:
        """What a row counts for in the token budget."""
        return len(row.ids)

    @abc.abstractmethod
    def prepare(self, items: list[Any], settings: dict[str, Any]) -> list[Job]:
        """One job an input; raises `InputError` where one of them cannot be answered."""

    @abc.abstractmethod
    def run(self, rows: list[Row], settings: dict[str, Any]) -> Results:
        """One forward pass: a result a row, or what gives them later."""

    @abc.abstractmethod
    def finish(self, job: Job, settings: dict[str, Any]) -> Any:
        """The answer, from the results of all rows."""

    # What tasks share

    @property
    def context(self) -> int:
        """Tokens that the model and its tokenizer take at the most."""
        return min(self.model.config.max_position_embeddings, self.tokenizer.model_max_length, UNLIMITED)

    def tokenize(self, texts: list[Any], pairs: list[Any] | None = None, **options: Any) -> list[Encoding]:
        """Token encodings of texts or pairs that fit the model's context.

        Args:
            texts: strings.
            pairs: second texts.
            options: of the tokenizer's call. `truncation` (True, or one of the tokenizer's ways to cut) cuts instead of
                refusing; so does `max_length` by itself.

        Raises:
            InputError: a text is no string, or empty, or not Unicode, or too long.
        """
        for text in (*texts, *(pairs or ())):
            check_text(text)
        given, length = options.pop("truncation", None), options.pop("max_length", None)
        if not (given is None or isinstance(given, bool) or (isinstance(given, str) and given in TRUNCATIONS)):
            raise InputError(f"truncation is {shown(given)}; choose True, False or one of {', '.join(TRUNCATIONS)}")
        longest = self.context if length is None else min(check_count("max_length", length), self.context)
        cut = length is not None if given is None else given not in (False, "do_not_truncate")
        limits: dict[str, Any] = {"truncation": given or True, "max_length": longest} if cut else {}
        encodings = self.tokenizer(texts, pairs, **{"truncation": False, **limits}, **options).encodings
        assert encodings is not None
        for i, encoding in enumerate(encodings):
            ids = encoding.ids  # which the library makes anew whenever it is asked
            if not ids:
                raise InputError(f"a text makes no token with this tokenizer: {short(texts[i])!r}")
            if max(ids) >= self.model.config.vocab_size:  # generation reads ids without another look
                raise InputError(
                    f"the tokenizer gives the id {max(ids)}, and the model has ids 0 to "
                    f"{self.model.config.vocab_size - 1}; take the model's own tokenizer, or make room for added "
                    "tokens: model.resize_token_embeddings(len(tokenizer))"
                )
            if len(ids) > longest:
                both = texts[i] if pairs is None else f"{texts[i]} {pairs[i]}"
                limit = "the model's context holds" if longest == self.context else "max_length is"
                hint = "; truncation=True cuts it" if "truncation" in self.options else ""
                raise InputError(f"a text has {len(ids)} tokens and {limit} {longest}: {short(both)!r}{hint}")
        return list(encodings)

    def pack(self, rows: Sequence[Row]) -> PackedInputs:
        """Texts packed on the model's device."""
        return PackedInputs.of_rows([row.ids for row in rows], self.model.device)


def _unpickled(cls: type[Pipeline], state: bytes, optimized: bool) -> Pipeline:
    pipeline = cls.__new__(cls)
    pipeline.__dict__.update(pickle.loads(state))
    if optimized:
        pipeline.model.optimize_for_inference()
    return pipeline


def read(values: torch.Tensor, finish: Callable[[torch.Tensor], Sequence[Any]]) -> Results:
    """`finish` of values on the CPU: at once where they are there, else later, when a card has computed them."""
    if values.device.type != "cuda":
        return finish(values.cpu())
    here = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    here.copy_(values, non_blocking=True)
    done = torch.cuda.current_stream(values.device).record_event()

    def later() -> Sequence[Any]:
        done.synchronize()
        return finish(here.clone() if here.nbytes > _PINNED else here)  # pinned memory is not for keeping

    return later


def _keep(chosen: list[tuple[Job, int]], results: Results) -> None:
    with torch.inference_mode():
        got = results() if callable(results) else results
    for (job, i), result in zip(chosen, got, strict=True):
        job.results[i] = result
