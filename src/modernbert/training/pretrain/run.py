"""A run of pretraining from tokens on disk to a finished folder: `pretrain`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from modernbert.errors import InputError
from modernbert.nn.losses import IGNORED
from modernbert.text.tokenizer import Tokenizer as LoadedTokenizer
from modernbert.training.checkpoints import checkpoints, explained, last_checkpoint
from modernbert.training.contract import Batch, Evaluation, Outcome, Pass, summed
from modernbert.training.distributed import end_together, process
from modernbert.training.engine import fit
from modernbert.training.folder import (
    check_libraries,
    check_unchanged,
    going_on,
    opened,
    read_settings,
    resumed,
    settings_before,
    write_settings,
)
from modernbert.training.precision import products, stored_in
from modernbert.training.pretrain.feed import PretrainFeed
from modernbert.training.pretrain.models import check_same, make_model
from modernbert.training.pretrain.objectives import LanguageModel, MaskedLM, Score, make_objective
from modernbert.training.pretrain.options import PretrainOptions
from modernbert.training.pretrain.shards import MANIFEST, Manifest, checksum, fingerprint, open_shard, verify_shard
from modernbert.training.pretrain.stream import PassStream
from modernbert.training.pretrain.texts import Corpus
from modernbert.training.pretrain.train_tokenizer import save_tokenizer
from modernbert.training.progress import Reporter, to_stderr
from modernbert.training.report import write_results

_NAME = "pretrain"


@dataclasses.dataclass
class Data:
    """Prepared text, mapped into memory.

    Attributes:
        train: shards to train on, of each source.
        held_out: shards that are kept out, of each source that has some.
        held_out_bytes: bytes of the text of each.
        tokenizer: of all of it.
        max_length: longest text, in tokens.
        digest: tells it from other data.
    """

    train: dict[str, list[Corpus]]
    held_out: dict[str, list[Corpus]]
    held_out_bytes: dict[str, int]
    tokenizer: Tokenizer
    max_length: int
    digest: str

    @classmethod
    def open(cls, folders: Sequence[str | Path], verify: bool = True) -> Data:
        """Map folders that `prepare_data` made.

        Args:
            folders: sources of equal names in several are told apart by their folders' names.
            verify: whether to compute all checksums.

        Raises:
            InputError: a folder is no such folder, a shard is missing or corrupt, or tokenizers differ.
        """
        if not folders:
            raise InputError("data is not given; name a folder that `modernbert prepare-data` made")
        places = [Path(folder).resolve() for folder in folders]
        for i, folder in enumerate(folders):
            if places[i] in places[:i]:
                raise InputError(f"{folder} is given twice; give each folder of data once")
        found = [(Path(folder), Manifest.read(Path(folder))) for folder in folders]
        tokenizers = [_tokenizer(folder, manifest) for folder, manifest in found]
        for folder, manifest in found[1:]:
            if manifest.tokenizer != found[0][1].tokenizer:
                raise InputError(f"{folder} was tokenized with another tokenizer than {found[0][0]}; prepare it again")
        data = cls({}, {}, {}, tokenizers[0], max(m.max_length for _, m in found), "")
        for folder, manifest in found:
            for name, source in manifest.sources.items():
                unique = f"{folder.name}/{name}" if name in data.train else name
                if unique in data.train:
                    raise InputError(f"{folder} has a source {unique}, as another folder does; rename the folder")
                for shard in [*source.train, *source.held_out] if verify else []:
                    verify_shard(folder, shard)
                data.train[unique] = [open_shard(folder, shard) for shard in source.train]
                if source.held_out:
                    data.held_out[unique] = [open_shard(folder, shard) for shard in source.held_out]
                    data.held_out_bytes[unique] = source.held_out_bytes
        sums = [checksum(folder / MANIFEST) for folder, _ in found]
        data.digest = hashlib.sha256(json.dumps(sums).encode()).hexdigest()
        return data


def _tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    tokenizer = LoadedTokenizer.from_pretrained(folder).backend
    if fingerprint(tokenizer) != manifest.tokenizer:
        path = folder / "tokenizer.json"
        raise InputError(f"{path} is another tokenizer than the manifest's; prepare the data again")
    return tokenizer


class Pretraining:
    """The objective of a run; see `modernbert.training.contract.Objective` and `Frame`.

    Args:
        options: of the run.
        data: what it trains on.
    """

    metric = "loss"
    greater_is_better = False
    reads_more_at_the_end = True

    def __init__(self, options: PretrainOptions, data: Data) -> None:
        self.options, self.data = options, data
        self.learnt = make_objective(options.objective, data.tokenizer, options.mask_rates[0][1])
        # Encoders are compared at the rate of BERT's papers, whatever rate they are trained at.
        self.judged = make_objective(options.objective, data.tokenizer, 0.15)
        self.model: LanguageModel = make_model(self.learnt, data.tokenizer, options, data.max_length)
        self.config = self.model.config

    def at_step(self, step: int, total: int) -> None:
        """Hide as many tokens as this part of the run does."""
        if isinstance(self.learnt, MaskedLM):
            self.learnt.mask_rate = [rate for share, rate in self.options.mask_rates if share * total <= step][-1]

    def collate(self, examples: Sequence[Any], seeds: Sequence[int]) -> Batch:
        """A packed batch with labels."""
        return self.learnt.batch([row for example in examples for row in example.rows], seeds)

    def count(self, batch: Batch) -> float:
        """Labels of a batch."""
        return self.learnt.count(batch)

    def losses(self, model: nn.Module, batches: Sequence[Batch], total: float, one_pass: Pass) -> Tensor:
        """Of labelled tokens alone."""
        with self.learnt.ready(model):
            return summed(model, batches, total, one_pass)

    def evaluate(self, model: Any, at_the_end: bool) -> Evaluation | None:
        """Figures on the held-out text of each source, and on all of it; None without any."""
        scores: dict[str, Score] = {}
        budget = None if at_the_end else self.options.eval_tokens
        for name, shards in self.data.held_out.items():
            texts = (shard[i] for shard in shards for i in range(len(shard)))
            with contextlib.suppress(InputError):  # a source may hold out a text too short to hide anything in
                scores[name] = self.judged.evaluate(model, texts, budget=8192, max_tokens=budget)
        if not scores:
            return None
        figures = self._figures(Score.mean(list(scores.values())), list(scores))
        for name, score in scores.items() if len(scores) > 1 else ():
            figures |= {f"{key}/{name}": value for key, value in self._figures(score, [name]).items() if key != "top5"}
        return Evaluation(figures)

    def _figures(self, score: Score, sources: Sequence[str]) -> dict[str, float]:
        figures = {"loss": score.loss, "accuracy": score.top1, "top5": score.top5}
        if not isinstance(self.judged, MaskedLM):
            shards = [shard for name in sources for shard in self.data.held_out[name]]
            said = sum(len(shard.tokens) - len(shard) for shard in shards)  # all but the first token of each text
            size = sum(self.data.held_out_bytes[name] for name in sources)
            figures["perplexity"] = math.exp(min(score.loss, 700))
            figures["bits_per_byte"] = score.loss / math.log(2) * said / size
        return figures

    def save(self, model: Any, folder: Path) -> None:
        """Write the model and its tokenizer, in the ordinary form."""
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        self._save_tokenizer(folder)

    def load_weights(self, model: Any, folder: Path) -> None:
        """Read the weights that `save` wrote."""
        check_same(model, folder)
        model.load_state_dict(type(model).from_pretrained(folder, dtype=torch.float32).state_dict())

    def _save_tokenizer(self, folder: Path) -> None:
        finished = self.learnt.finish_tokenizer(self.data.tokenizer)
        save_tokenizer(finished, folder, self.config.max_position_embeddings)

    @property
    def frame(self) -> Skeleton:
        """For runs in which every process has a part of the weights."""
        return Skeleton(self)


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A model without its weights; see `modernbert.training.contract.Frame`."""

    run: Pretraining

    def save(self, model: Any, folder: Path) -> None:
        """Write configuration and tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        self.run.config.save_pretrained(folder)
        self.run._save_tokenizer(folder)

    def without_labels(self, batch: Batch) -> Batch:
        """A batch with nothing to say."""
        return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}

    def rebuild(self, weights: Mapping[str, Tensor]) -> Any:
        """A model of these weights."""
        kind: Any = self.run.learnt.model_class
        model = kind(self.run.config)
        model.load_state_dict(dict(weights), strict=False)
        model.tie_weights()
        return model.eval()


@dataclasses.dataclass
class Pretrained:
    """A finished run.

    Attributes:
        model: what was trained, in evaluation mode, float32.
        tokenizer: of the data.
        figures: on the held-out text; empty without any.
        outcome: steps, seconds, tokens, and the evaluation.
        output: the run's folder, which `from_pretrained` and `pipeline` load.
    """

    model: Any
    tokenizer: Tokenizer
    figures: dict[str, float]
    outcome: Outcome
    output: Path


def pretrain(
    data: str | Path | Sequence[str | Path] | None = None,
    output: str | Path | None = None,
    *,
    settings: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> Pretrained:
    """Train a language model on prepared text.

    Args:
        data: folder or folders that `prepare_data` made.
        output: folder of the run. It gets checkpoints, `metrics.jsonl`, `run.yaml`, and at the end the model, its
            tokenizer, `results.json` and `report.html`.
        settings: a YAML file of options; those that are given here count more.
        resume: go on from the last checkpoint under `output`, with its options.
        progress: draw progress on standard error.
        say: takes a line about what was found; standard error if not given.
        options: see `modernbert.training.pretrain.options.PretrainOptions`.

    Raises:
        InputError, ConfigError: an option is impossible, data are of no use, or the folder is in use.
        DivergedError: the loss is no number.
        InterruptedRunError: the run was told to end, or lost a process.
        OSError: a file cannot be read or written.
    """
    folders = [data] if isinstance(data, str | Path) else data
    given = {"data": None if folders is None else list(map(str, folders)), **options}
    given["output"] = None if output is None else str(output)
    chosen = _settings({k: v for k, v in given.items() if v is not None}, settings, resume)
    if not chosen.output:
        raise InputError("output is not given; name a folder for the run")
    folder = Path(chosen.output).resolve()
    check_libraries("accelerate", "jinja2")
    where = process(chosen)
    if not where.is_main_process:
        say = _silent
    say = say or to_stderr
    with opened(folder, resume) if where.is_main_process else contextlib.nullcontext():
        where.wait_for_everyone()
        changes = going_on(folder, _NAME, chosen, say) if resume and where.is_main_process else []
        # One process computes the checksums; all map the files.
        prepared = Data.open(chosen.data, chosen.verify and where.is_main_process)
        if chosen.micro_tokens < prepared.max_length:
            raise InputError(
                f"micro_tokens is {chosen.micro_tokens}, and texts of the data have up to {prepared.max_length} tokens"
            )
        run = Pretraining(chosen, prepared)
        if resume and checkpoints(folder):
            check_same(run.model, last_checkpoint(folder)[0])
        stream = PassStream(prepared.train, chosen.micro_tokens, chosen.seed, chosen.weights)
        feed = PretrainFeed(stream, chosen, prepared.digest)
        sizes = ", ".join(f"{name} {size:,}" for name, size in zip(stream.names, stream.sizes, strict=True))
        if chosen.model is not None and (note := stored_in(run.config.dtype)):
            say(note)
        computed = products(chosen.precision, where.device)
        say(
            f"{run.model.num_parameters() / 1e6:.2f} M parameters; tokens: {sizes}; {feed.total} steps; products in "
            f"{computed}"
        )

        def begin() -> None:
            if where.is_main_process:
                write_settings(folder, _NAME, chosen, changes)
            where.wait_for_everyone()

        with Reporter(run.metric, progress and where.is_main_process) as report:
            frame = run.frame if chosen.shard else None
            outcome = fit(run.model, feed, run, chosen, folder, resume=resume, report=report, begin=begin, frame=frame)
        figures = {} if outcome.evaluation is None else outcome.evaluation.figures
        result = Pretrained(outcome.model, prepared.tokenizer, figures, outcome, folder)
        if where.is_main_process:
            with explained(folder):
                _finish(result, run, chosen, changes)
        end_together(where)
        return result


def _silent(line: str) -> None:
    """Another process says it."""


def _settings(given: Mapping[str, Any], settings: str | Path | None, resume: bool) -> PretrainOptions:
    """Options of a file, of the run that goes on, and those given, which count most."""
    named = {} if settings is None else read_settings(Path(settings), _NAME)
    output = given.get("output", named.get("output"))
    before = settings_before(output, _NAME) if resume else {}
    options = PretrainOptions.of(
        {**resumed(named, before), **given}, str(settings) if settings is not None else "pretraining"
    )
    if output is not None:
        check_unchanged(Path(output), before, options, ("data", "output", "verify", "eval_tokens", "save_dtype"))
    return options


def _finish(result: Pretrained, run: Pretraining, options: PretrainOptions, changes: Sequence[str]) -> None:
    """Write the finished model and all that is told of it."""
    folder, outcome = result.output, result.outcome
    model = result.model
    if options.save_dtype != "float32":
        model = copy.deepcopy(model).to(getattr(torch, options.save_dtype))
    run.save(model, folder)
    texts = [sum(len(s) for shards in part.values() for s in shards) for part in (run.data.train, run.data.held_out)]
    about = {
        "model": options.model or f"a new {'encoder' if options.objective == 'mlm' else 'decoder'}",
        "parameters": result.model.num_parameters(),
        "train_examples": texts[0],
        "eval_examples": texts[1],
    }
    write_results(folder, _NAME, run.metric, outcome, options, about, changes)
