"""What every pipeline does: load, tokenize, pack to a token budget, run, and give answers in order.

An input becomes one or more rows of ids. Rows of many inputs are sorted by length in a look-ahead window and packed
together up to a token budget; when an input's rows have their results, the task makes its answer of them.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import contextvars
import dataclasses
import functools
import inspect
import itertools
import math
import pickle
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from tokenizers import Encoding

from modernbert.auto import TRAINED_HEADS, AutoConfig, architectures_of, kind_of, kind_of_adapter
from modernbert.checks import Options, check_text, fields_of, short
from modernbert.engines.guard import is_frozen
from modernbert.errors import InputError, listed, shown
from modernbert.io.hub import Source
from modernbert.models.loading import mapped_weights
from modernbert.models.placement import resolve_device, resolve_dtype
from modernbert.models.sentence_layout import load_tokenizer
from modernbert.nn.packing import PackedInputs
from modernbert.pipelines.inputs import as_list, check_iterable, check_no_tables, watched
from modernbert.pipelines.options import BatchOptions, TokenizeOptions, own_options
from modernbert.pipelines.progress import progress_bar
from modernbert.text.encoding import UNLIMITED
from modernbert.text.tokenizer import Tokenizer

_LOADING = ("attn_implementation", "device_map", "quantization_config", "adapter", "merge_adapter")
_PLACES = ("revision", "subfolder", "cache_dir", "token", "local_files_only")
_LOOK_AHEAD = 4096  # inputs that are sorted by length together, at the most
_BUDGETS = 8  # forward passes that a window is enough for
_TOKENIZED_TOGETHER = 64
_PINNED = 2**26  # bytes of pinned memory that a batch's results may stay in
CPU_BUDGET, GPU_BUDGET = 4096, 65536  # tokens of a forward pass


@dataclasses.dataclass
class Row:
    """One sequence of ids for the model; tasks add what its result needs to know about it.

    Attributes:
        ids: its tokens.
        number: of its input in the stream, those that cannot be answered counted too.
        states: (tokens, hidden size) the encoder's last states of it, while another task's pass has given them.
    """

    ids: Sequence[int]
    number: int = dataclasses.field(default=0, kw_only=True)
    states: torch.Tensor | None = dataclasses.field(default=None, kw_only=True, repr=False, compare=False)


OptionsT = TypeVar("OptionsT")  # options of a call, resolved
RowT = TypeVar("RowT", bound=Row)
ResultT = TypeVar("ResultT")  # what the model says of a row
Results = Sequence[ResultT] | Callable[[], Sequence[ResultT]]  # one a row, or what gives them later


@dataclasses.dataclass
class Job(Generic[RowT, ResultT]):
    """One input on its way through the model.

    Attributes:
        item: the input.
        rows: what the model sees of it.
        results: one a row, filled in as batches are run.
        error: why it cannot be answered, if it cannot.
    """

    item: Any
    rows: list[RowT] = dataclasses.field(default_factory=list)
    results: list[ResultT] = dataclasses.field(default_factory=list)
    error: InputError | None = None
    is_cut: bool = False  # whether a text of it was cut, if that was asked for
    given: dict[str, Any] = dataclasses.field(default_factory=dict)  # options of the caller, if it calls step by step


_STEPS_OF_TRANSFORMERS = ("_sanitize_parameters", "preprocess", "forward", "_forward", "postprocess")


class Pipeline(abc.ABC, Generic[OptionsT, RowT, ResultT]):
    """A model and its tokenizer, ready for texts.

    A task names its `options`, a dataclass whose fields are the keyword arguments of its calls; what depends on the
    model is filled in by `resolve`. `prepare` makes rows of inputs, `run` results of rows, `finish` answers of results.

    Args:
        model: a loaded model; it is put in evaluation mode.
        tokenizer: its tokenizer.
        batch_tokens: tokens of a forward pass, all its texts together; by default 4,096 on a CPU, 65,536 on a GPU.
        batch_size: most rows of a forward pass; by default as many as `batch_tokens` allow.
        device, dtype: where to move the model, and the dtype of its weights; by default it stays as it is.
        defaults: options of the task's calls.
    """

    framework, num_workers = "pt", 0
    feature_extractor = image_processor = processor = None

    task: ClassVar[str]
    options: ClassVar[type[Options]]
    auto_model: ClassVar[Any]  # the class that loads its models
    models: ClassVar[tuple[type, ...]]  # the classes that it takes
    needs: ClassVar[str]  # these, in words
    architecture: ClassVar[str | None] = "encoder"  # what its models are; None where either kind serves
    fields: ClassVar[tuple[str, ...]] = ()  # of an input that is a dict, which calls also take as arguments
    second: ClassVar[str | None] = None  # the argument of a call that may follow the inputs without its name

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let `help` and `inspect.signature` show the inputs and options of each task."""
        super().__init_subclass__(**kwargs)
        if others := [name for name in _STEPS_OF_TRANSFORMERS if name in vars(cls)]:
            raise TypeError(f"{cls.__name__} defines {others[0]}; a task defines resolve, prepare, run and finish")
        if "options" not in vars(cls):
            return
        fields = fields_of(cls.options)
        described = [f"    {field.name}: {field.described}" for field in fields]
        cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Options of a call:", *described])
        call = cls.__call__

        @functools.wraps(call)
        def shown(self: Any, *args: Any, **options: Any) -> Any:
            return call(self, *args, **options)

        keyword, both = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        own = list(inspect.signature(Pipeline.__call__).parameters.values())
        own = [own[0], own[1], *(p for p in own if p.kind is keyword)]
        inputs = [name for name in cls.fields if name != cls.second]
        known = [inspect.Parameter(name, keyword, default=None, annotation=Any) for name in inputs]
        known += [inspect.Parameter(f.name, keyword, default=f.default, annotation=f.kind) for f in fields]
        parameters = [p for p in (*own[:2], *known, *own[2:]) if p.name != cls.second]
        if cls.second is not None:
            parameters.insert(2, inspect.Parameter(cls.second, both, default=None, annotation=Any))
        vars(shown)["__signature__"] = inspect.Signature(parameters)
        typing.cast(Any, cls).__call__ = shown

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        **defaults: Any,
    ) -> None:
        if not any(isinstance(model, taken) for taken in self.models):
            raise InputError(f"{self.task} needs {self.needs}; this is a {type(model).__name__}")
        if device is not None:
            model.to(resolve_device(device))
        if (dtype := torch_dtype if dtype is None else dtype) is not None:
            model.to(resolve_dtype(dtype, model.dtype, model.device))
        if not callable(tokenizer):
            raise InputError(
                f"tokenizer is {shown(tokenizer)}; give a tokenizer, or a folder or repository that has one"
            )
        self.model: Any = model.eval()
        self.tokenizer = tokenizer
        sizes = BatchOptions(batch_tokens=batch_tokens, batch_size=batch_size)
        self.batch_tokens = sizes.batch_tokens or (CPU_BUDGET if model.device.type == "cpu" else GPU_BUDGET)
        self.batch_size = sizes.batch_size
        self.defaults: dict[str, Any] = {}
        self.defaults = self.accepted(defaults)
        self.given({})

    @classmethod
    def load(cls, model: Any, tokenizer: Any = None, *, device: Any = None, dtype: Any = None, **kwargs: Any) -> Self:
        """Load what is not loaded yet, make it ready to serve, and make a pipeline of it."""
        config, more = kwargs.pop("config", None), kwargs.pop("model_kwargs", None) or {}
        if not isinstance(more, Mapping):
            raise InputError(f"model_kwargs is {shown(more)}; give a dict of arguments of from_pretrained")
        if twice := [name for name in more if kwargs.get(name, {"dtype": dtype}.get(name)) is not None]:
            raise InputError(f"{twice[0]} is given twice, as an argument and in model_kwargs; give it once")
        loading = {k: v for k, v in more.items() if k not in (*_PLACES, "dtype", "torch_dtype")}
        dtype = more.get("dtype", more.get("torch_dtype")) if dtype is None else dtype
        kwargs |= {k: v for k, v in more.items() if k in _PLACES}
        places = {k: kwargs.pop(k) for k in _PLACES if k in kwargs}
        loading |= {k: kwargs.pop(k) for k in _LOADING if k in kwargs}
        if isinstance(config, str | Path):
            config = AutoConfig.from_pretrained(config, **places)
        if isinstance(model, str | Path):
            tokenizer = model if tokenizer is None else tokenizer
            cls._check_architecture(model, places, loading.get("adapter"))
            loading |= {} if config is None else {"config": config}
            source, given = Source.pop_from(model, dict(places)), loading.get("adapter")
            if (source.folder is not None and source.is_adapter) or (given and not isinstance(given, Mapping)):
                loading.setdefault("merge_adapter", True)  # it is served alone, and kernels then run whole layers
            with contextlib.nullcontext() if _PLAIN.get() else mapped_weights():
                model = cls.auto_model.from_pretrained(model, device=device, dtype=dtype, **places, **loading)
                if not _PLAIN.get():
                    model.optimize_for_inference()
            device = dtype = None
        elif tokenizer is None:
            raise InputError("model is loaded already, so its tokenizer cannot be guessed; give tokenizer=")
        elif loading or config not in (None, getattr(model, "config", None)):
            raise InputError(f"{', '.join(loading) or 'config'} is for loading, and model is loaded already")
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(tokenizer, **places)
        made = cls(model, tokenizer, device=device, dtype=dtype, **kwargs)
        if made.defaults:
            with torch.random.fork_rng(devices=[]):  # a task may draw a seed
                made.check_defaults()
        return made

    @classmethod
    def _check_architecture(cls, model: str | Path, places: dict[str, Any], adapter: Any) -> None:
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
        wanted, found = getattr(cls.auto_model, "kind", "base"), kind_of_adapter(adapter) or kind_of(values) or "base"
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

    def __repr__(self) -> str:
        config, name = self.model.config, getattr(self.model, "name_or_path", "") or self.tokenizer.name_or_path
        return (
            f"{type(self).__name__}(task={self.task!r}, model={type(self.model).__name__}"
            f"{f' of {name}' if name else ''}, dtype={str(self.dtype).removeprefix('torch.')}, device={self.device}, "
            f"layers={config.num_hidden_layers}, dimensions={getattr(self, 'dimensions', config.hidden_size)})"
        )

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights."""
        return self.model.dtype

    torch_dtype = dtype

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the model and its tokenizer into a folder; options are those of the model's `save_pretrained`."""
        self.model.save_pretrained(save_directory, **options)
        self.tokenizer.save_pretrained(save_directory)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload the model and its tokenizer; options are those of the model's `push_to_hub`."""
        self.tokenizer.push_to_hub(repo_id, **options)
        return self.model.push_to_hub(repo_id, **options)

    # Inputs in, answers out

    def __call__(
        self,
        inputs: Any = None,
        *more: Any,
        on_error: str = "raise",
        progress: bool = False,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        adapter_names: Sequence[str] | None = None,
        **options: Any,
    ) -> Any:
        """Answer one input, a list of inputs (with a list), or any other iterable (with an iterator).

        Arrays, columns and other sequences are taken as lists; datasets of PyTorch, such as transformers' `KeyDataset`,
        as iterables. A text is taken as it is: the line end of a file's line is a part of it, unless the caller removes
        it.

        Args:
            inputs: what the task takes; the fields of one input can be given as arguments instead.
            on_error: "raise" stops at the first input that cannot be answered, after the answers before it; "return"
                gives the `InputError` instead of its answer and continues.
            progress: draw a progress bar on standard error.
            batch_size, batch_tokens: instead of those of the pipeline.
            adapter_names: for each input of a list the adapter that acts on it, "__base__" for none. Inputs of an
                adapter are computed together, and get the bits of a call with that adapter alone. The model is switched
                meanwhile, so other threads must not use it.
            options: the task's own; those of tokenizing may be given as a dict, too, `tokenizer_kwargs`.

        Raises:
            InputError: an input cannot be answered, or an option is not allowed.
        """
        if len(more) > (self.second is not None):
            raise TypeError(f"{self.task} takes {1 + (self.second is not None)} arguments without a name at the most")
        if more and more[0] is not None:
            options[str(self.second)] = more[0]
        inputs = self._joined(inputs, {name: options.pop(name, None) for name in self.fields})
        settings = {"on_error": on_error, "progress": progress, **options}
        settings |= {"batch_size": batch_size, "batch_tokens": batch_tokens}
        if adapter_names is not None and (isinstance(inputs, str | dict) or isinstance(adapter_names, str)):
            raise InputError(f"adapter_names is {shown(adapter_names)}; give a list of inputs and a list of names")
        if isinstance(inputs, str | dict):
            check_no_tables(inputs)
            return next(self.stream([inputs], **settings))
        inputs = as_list(inputs)
        if isinstance(inputs, list | tuple):
            if not inputs:
                raise InputError("inputs is an empty list; give at least one")
            if adapter_names is not None:
                return self.gather(self._by_adapter(inputs, list(adapter_names), settings))
            return self.gather(list(self.stream(inputs, **settings)))
        if adapter_names is not None:
            raise InputError("adapter_names needs a list of inputs, one for each name")
        return self.stream(watched(check_iterable("inputs", inputs)), **settings)

    def _by_adapter(self, inputs: Sequence[Any], names: list[str], settings: dict[str, Any]) -> list[Any]:
        """Answers in the order of the inputs, computed for one adapter after the other."""
        owners = (self.model, getattr(self.model, "model", None))
        adapted: Any = next((owner for owner in owners if getattr(owner, "adapter_names", None)), None)
        known = [] if adapted is None else adapted.adapter_names
        if len(names) != len(inputs):
            raise InputError(f"adapter_names has {len(names)} names and there are {len(inputs)} inputs")
        if unknown := [name for name in names if name not in (*known, "__base__")]:
            raise InputError(f"adapter_names holds {shown(unknown[0])}; the model has {listed(known) or 'no adapters'}")
        if adapted is None:
            return list(self.stream(inputs, **settings))
        before, answers = adapted.active_adapters(), dict[int, Any]()
        try:
            for name in dict.fromkeys(names):
                own = [i for i, other in enumerate(names) if other == name]
                if name == "__base__":
                    adapted.disable_adapters()
                elif adapted.active_adapters() != [name]:
                    adapted.set_adapter(name)
                answers.update(zip(own, self.stream([inputs[i] for i in own], **settings), strict=True))
        finally:
            if adapted.active_adapters() != before:
                adapted.set_adapter(before) if before else adapted.disable_adapters()
        return [answers[i] for i in range(len(inputs))]

    def predict(self, X: Any, **options: Any) -> Any:
        """The same as a call, under the name that scikit-learn has for it."""
        return self(X, **options)

    transform = predict

    def preprocess(self, inputs: Any, **options: Any) -> Job[RowT, ResultT]:
        """The first step of a call with one input: what the model sees of it."""
        (rows,) = self.prepare([inputs], self.resolve(self.given(options)))
        return Job(inputs, rows, given=options)

    def forward(self, model_inputs: Job[RowT, ResultT], **options: Any) -> Job[RowT, ResultT]:
        """The second step: what the model says of what `preprocess` gave, all of it in one pass."""
        job = dataclasses.replace(model_inputs, given={**model_inputs.given, **options})
        with torch.inference_mode():
            results = self.run(job.rows, self.resolve(self.given(job.given)))
            job.results = list(results() if callable(results) else results)
        return job

    _forward = forward

    def postprocess(self, model_outputs: Job[RowT, ResultT], **options: Any) -> Any:
        """The last step: the answer, from what `forward` gave."""
        return self.finish(model_outputs, self.resolve(self.given({**model_outputs.given, **options})))

    def _joined(self, inputs: Any, given: dict[str, Any]) -> Any:
        """The inputs, or what their fields make that were given as arguments; the first field may stand first."""
        if any(value is not None for value in given.values()):
            first = next(iter(given))
            if given[first] is None:
                given[first], inputs = inputs, None
            if inputs is None:
                return self.join(given)
        elif inputs is not None or not given:
            return inputs
        raise InputError(f"give {' and '.join(self.fields)}, or dicts that hold them, and not both")

    def join(self, fields: dict[str, Any]) -> Any:
        """The input that these fields make; a task may take several values of each."""
        return fields

    def gather(self, answers: list[Any]) -> Any:
        """What a list of inputs is answered by."""
        return answers

    def stream(
        self,
        inputs: Iterable[Any],
        *,
        on_error: str = "raise",
        progress: bool = False,
        first: int = 0,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        **options: Any,
    ) -> Iterator[Any]:
        """Answers of inputs, in their order, as they come; memory does not grow with their number.

        Arguments as those of a call, and `first`, the number of the first input if these continue others.
        """
        if on_error not in ("raise", "return"):
            raise InputError(f"on_error is {shown(on_error)}; choose raise or return")
        resolved = self.resolve(self.given(options))
        sizes = BatchOptions.kept(
            batch_tokens=batch_tokens or self.batch_tokens, batch_size=batch_size or self.batch_size
        )
        items = inputs if isinstance(inputs, list | tuple) else check_iterable("inputs", inputs)
        total = len(inputs) if isinstance(inputs, Sized) else None
        jobs = self._stream(items, resolved, on_error == "return", itertools.count(first), sizes)
        answers = (answer for _, answer in jobs)
        return progress_bar(answers, total, self.task) if progress else answers

    def stream_with_jobs(self, inputs: Iterable[Any], **options: Any) -> Iterator[tuple[Job[RowT, ResultT], Any]]:
        """As `stream` with on_error="return", and each answer with its job: what the model saw, and whether it was cut.

        It costs a second look at texts that were cut, and at those tokenized together with them.
        """
        sizes = BatchOptions(batch_tokens=self.batch_tokens, batch_size=self.batch_size)
        resolved = self.resolve(self.given(options))
        return self._stream(inputs, resolved, True, itertools.count(), sizes, marks_cut=True)

    def given(self, options: dict[str, Any]) -> Any:
        """The options of a call, over those that were given when the pipeline was made; raises `InputError`."""
        return self.options.of({**self.defaults, **self.accepted(options)}, self.task)

    def accepted(self, options: dict[str, Any]) -> dict[str, Any]:
        """The task's own options, of all that callers may give; raises `InputError`."""
        return own_options(options, self.task, self.options)

    def _stream(
        self,
        inputs: Iterable[Any],
        options: OptionsT,
        go_on: bool,
        numbers: Iterator[int],
        sizes: BatchOptions,
        marks_cut: bool = False,
    ) -> Iterator[tuple[Job[RowT, ResultT], Any]]:
        """Jobs with their answers, or with the `InputError` of those that have none."""
        iterator = iter(inputs)
        broken: Exception | None = None
        while broken is None:
            window, broken = self._window(iterator, options, go_on, numbers, sizes.batch_tokens or 1, marks_cut)
            if not window and broken is None:
                return
            self._run(window, options, sizes)
            while window:
                job = window.popleft()
                if job.error is None:
                    yield job, self.finish(job, options)
                elif go_on:
                    yield job, job.error
                else:
                    raise job.error
        raise broken

    def _window(
        self,
        iterator: Iterator[Any],
        options: OptionsT,
        go_on: bool,
        numbers: Iterator[int],
        budget: int,
        marks_cut: bool,
    ) -> tuple[collections.deque[Job[RowT, ResultT]], Exception | None]:
        """The next jobs, enough for several forward passes; up to an error where it ends the stream.

        The second value is what the inputs' own iterator raised; what it gave before is answered first.
        """
        window: collections.deque[Job[RowT, ResultT]] = collections.deque()
        tokens = 0
        while len(window) < _LOOK_AHEAD and tokens < _BUDGETS * budget:
            items: list[Any] = []
            broken: Exception | None = None
            try:
                for item in itertools.islice(iterator, _TOKENIZED_TOGETHER):
                    items.append(item)
            except Exception as error:
                broken = error
            prepared = self._marked if marks_cut else self._prepared
            for job in prepared(items, options) if items else ():
                number = next(numbers)
                for row in job.rows:
                    row.number = number
                    tokens += self.weight(row)
                window.append(job)
                if job.error is not None and not go_on:
                    return window, None
            if broken is not None or not items:
                return window, broken
        return window, None

    def _prepared(self, items: list[Any], options: OptionsT) -> list[Job[RowT, ResultT]]:
        """The rows of each input, tokenized together; one by one if one of them is wrong."""
        try:
            wrong = next((item for item in items if isinstance(item, InputError)), None)  # of whoever made the inputs
            if wrong is not None:
                raise wrong
            return [Job(item, rows) for item, rows in zip(items, self.prepare(items, options), strict=True)]
        except InputError as error:
            if len(items) == 1:
                return [Job(items[0], error=error)]
        return [job for item in items for job in self._prepared([item], options)]

    def _marked(self, items: list[Any], options: OptionsT) -> list[Job[RowT, ResultT]]:
        """As `_prepared`, and each job says whether a text of it was cut."""
        with cut_texts() as cut:
            jobs = self._prepared(items, options)
        for job in jobs if cut else ():
            with cut_texts() as own:
                self._prepared([job.item], options)
            job.is_cut = bool(own)
        return jobs

    def _run(self, window: collections.deque[Job[RowT, ResultT]], options: OptionsT, sizes: BatchOptions) -> None:
        rows = [(job, i) for job in window for i in range(len(job.rows))]
        for job in window:
            job.results = typing.cast(list[ResultT], [None] * len(job.rows))
        begun: list[tuple[list[tuple[Job[RowT, ResultT], int]], Results[ResultT]]] = []
        for batch in self._batches([self.weight(job.rows[i]) for job, i in rows], sizes):
            chosen = [rows[k] for k in batch]
            with torch.inference_mode():
                results = self.run([job.rows[i] for job, i in chosen], options)
            begun.append((chosen, results))
            if len(begun) > 1:  # a card computes this batch while the one before is read, and the next one is packed
                _keep(*begun.pop(0))
        for chosen, results in begun:
            _keep(chosen, results)

    def _batches(self, lengths: list[int], sizes: BatchOptions) -> Iterator[list[int]]:
        """Numbers of rows, long rows first, as many together as the token budget holds, in batches of like size."""
        total, most = sum(lengths), sizes.batch_tokens or 1
        budget = math.ceil(total / math.ceil(total / most)) if total else 1
        batch: list[int] = []
        tokens = 0
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            full = tokens >= budget or tokens + lengths[i] > most or len(batch) == sizes.batch_size
            if batch and full:
                yield batch
                batch, tokens = [], 0
            batch.append(i)
            tokens += lengths[i]
        if batch:
            yield batch

    # What a task defines

    def resolve(self, options: Any) -> OptionsT:
        """The options of a call with what depends on the model filled in; raises `InputError`."""
        resolved: OptionsT = options
        return resolved

    def check_defaults(self) -> None:
        """Check the options that were given when the pipeline was made; raises `InputError`."""
        self.resolve(self.given({}))

    def weight(self, row: RowT) -> int:
        """What a row counts for in the token budget."""
        return len(row.ids)

    def reads_states(self, row: RowT, options: OptionsT) -> bool:
        """Whether a row's result follows from the encoder's last states of its ids, as a pass for any task has them."""
        return True

    @abc.abstractmethod
    def prepare(self, items: list[Any], options: OptionsT) -> list[list[RowT]]:
        """The rows of each input; raises `InputError` where one of them cannot be answered."""

    @abc.abstractmethod
    def run(self, rows: list[RowT], options: OptionsT) -> Results[ResultT]:
        """One forward pass: a result a row, or what gives them later."""

    @abc.abstractmethod
    def finish(self, job: Job[RowT, ResultT], options: OptionsT) -> Any:
        """The answer of an input, from the results of all its rows."""

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
            options: those of `TokenizeOptions`. `truncation` (True, or one of the tokenizer's ways to cut) cuts instead
                of refusing; so does `max_length` alone.

        Raises:
            InputError: a text is no string, or empty, or not Unicode, or too long.
        """
        for text in (*texts, *(pairs or ())):
            check_text(text)
        how, context = TokenizeOptions.kept(**options), self.context
        longest = min(how.max_length or context, context)
        limits = self.cut(how)
        encodings: Sequence[Encoding] | None
        if type(self.tokenizer) is Tokenizer:
            encodings = self.tokenizer.encodings(texts, pairs, **limits)
        else:  # one of somebody's own
            encodings = self.tokenizer(texts, pairs, **limits).encodings
        assert encodings is not None
        if limits["truncation"] and (found := _CUT.get()) is not None:
            found += [text for text, encoding in zip(texts, encodings, strict=True) if encoding.overflowing]
        vocabulary = self.model.config.vocab_size
        for i, encoding in enumerate(encodings):
            ids = encoding.ids  # which the library makes anew whenever it is asked
            if not ids:
                raise InputError(f"a text makes no token with this tokenizer: {short(texts[i])!r}")
            if max(ids) >= vocabulary:  # generation reads ids without another look
                raise InputError(
                    f"the tokenizer gives the id {max(ids)}, and the model has ids 0 to {vocabulary - 1}; take the "
                    "model's own tokenizer, or make room for added tokens: "
                    "model.resize_token_embeddings(len(tokenizer))"
                )
            if len(ids) > longest:
                both = texts[i] if pairs is None else f"{texts[i]} {pairs[i]}"
                limit = "the model's context holds" if longest == context else "max_length is"
                hint = "; truncation=True cuts it" if hasattr(self.options, "truncation") else ""
                raise InputError(f"a text has {len(ids)} tokens and {limit} {longest}: {short(both)!r}{hint}")
        return list(encodings)

    def cut(self, how: TokenizeOptions) -> dict[str, Any]:
        """Arguments of the tokenizer that say how a text is cut and what is put around it."""
        limits: dict[str, Any] = {"add_special_tokens": how.add_special_tokens, "truncation": False}
        cuts = (
            how.max_length is not None if how.truncation is None else how.truncation not in (False, "do_not_truncate")
        )
        if cuts:
            context = self.context
            limits |= {"truncation": how.truncation or True, "max_length": min(how.max_length or context, context)}
        return limits

    def pack(self, rows: Sequence[RowT]) -> PackedInputs:
        """Texts packed on the model's device, with their states where these are known."""
        inputs = PackedInputs.of_rows([row.ids for row in rows], self.model.device)
        states = [row.states for row in rows if row.states is not None]
        if rows and len(states) == len(rows):
            return dataclasses.replace(inputs, states_TM=torch.cat(states))
        return inputs


_CUT: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("cut", default=None)


@contextlib.contextmanager
def cut_texts() -> Iterator[list[str]]:
    """Collect the texts that are cut to the context while rows are prepared in this block."""
    found: list[str] = []
    token = _CUT.set(found)
    try:
        yield found
    finally:
        _CUT.reset(token)


_PLAIN: contextvars.ContextVar[bool] = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def left_plain() -> Iterator[None]:
    """In this block, models that pipelines load are not optimized for inference, because that is done later."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


_MOST: contextvars.ContextVar[int | None] = contextvars.ContextVar("most", default=None)


@contextlib.contextmanager
def limited_windows(tokens: int) -> Iterator[None]:
    """In this block, refuse texts whose windows hold more tokens than this, all together."""
    token = _MOST.set(tokens)
    try:
        yield
    finally:
        _MOST.reset(token)


def check_windows(tokens: int, window: int, new: int) -> None:
    """Refuse a text where windows, each with so many new tokens, would be more than are allowed at present."""
    count = 1 + max(0, math.ceil((tokens - window) / max(1, new)))
    if (most := _MOST.get()) is not None and count * min(tokens, window) > most:
        raise InputError(
            f"a text of {tokens:,} tokens makes {count:,} windows, which hold more than the {most:,} tokens that are "
            "read at one time; give shorter texts, or windows that share less"
        )


def _unpickled(cls: type[Pipeline[Any, Any, Any]], state: bytes, optimized: bool) -> Pipeline[Any, Any, Any]:
    pipeline = cls.__new__(cls)
    pipeline.__dict__.update(pickle.loads(state))
    if optimized:
        pipeline.model.optimize_for_inference()
    return pipeline


def read(values: torch.Tensor, finish: Callable[[torch.Tensor], Sequence[ResultT]]) -> Results[ResultT]:
    """`finish` of values on the CPU: at once where they are there, else later, when a card has computed them."""
    if values.device.type != "cuda":
        return finish(values.cpu())
    here = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    here.copy_(values, non_blocking=True)
    done = torch.cuda.current_stream(values.device).record_event()

    def later() -> Sequence[ResultT]:
        done.synchronize()
        return finish(here.clone() if here.nbytes > _PINNED else here)  # pinned memory is not for keeping

    return later


def _keep(chosen: list[tuple[Job[RowT, ResultT], int]], results: Results[ResultT]) -> None:
    with torch.inference_mode():
        got = results() if callable(results) else results
    for (job, i), result in zip(chosen, got, strict=True):
        job.results[i] = result
