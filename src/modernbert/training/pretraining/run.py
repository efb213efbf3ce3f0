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
from modernbert.training.checkpoints import checkpoints, last_checkpoint
from modernbert.training.contract import Batch, Evaluation, Pass, summed
from modernbert.training.model import products, stored_in
from modernbert.training.pretraining.feed import PretrainFeed
from modernbert.training.pretraining.models import check_same, filled, make_model
from modernbert.training.pretraining.objectives import LanguageModel, MaskedLM, Score, make_objective
from modernbert.training.pretraining.options import PretrainOptions
from modernbert.training.pretraining.shards import MANIFEST, Manifest, checksum, fingerprint, open_shard, verify_shard
from modernbert.training.pretraining.stream import PassStream
from modernbert.training.pretraining.texts import Corpus
from modernbert.training.pretraining.train_tokenizer import save_tokenizer
from modernbert.training.run import Finished, started


@dataclasses.dataclass
class Data:
    """Prepared text, mapped into memory.

    Attributes:
        train: shards to train on, by source.
        held_out: shards to evaluate on, by source, if it has some.
        held_out_bytes: bytes of the held-out text, by source.
        tokenizer: of all of it.
        max_length: longest text, in tokens.
        digest: differs from that of other data.
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
            folders: sources of the same name in several get their folders' names in front.
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
    """The objective of a run; see `modernbert.training.contract.ShardedObjective`.

    Args:
        options: of the run.
        data: what it trains on.
    """

    metric = "loss"
    greater_is_better = False
    reads_more_at_the_end = True

    def __init__(self, options: PretrainOptions, data: Data) -> None:
        self.options, self.data = options, data
        self.trained = make_objective(options.objective, data.tokenizer, options.mask_rates[0][1])
        # Encoders are compared at the rate of BERT's papers, whatever rate they are trained at.
        self.evaluated = make_objective(options.objective, data.tokenizer, 0.15)
        self.model: LanguageModel = make_model(self.trained, data.tokenizer, options, data.max_length)
        self.config = self.model.config

    def at_step(self, step: int, total: int) -> None:
        if isinstance(self.trained, MaskedLM):
            self.trained.mask_rate = [rate for share, rate in self.options.mask_rates if share * total <= step][-1]

    def collate(self, examples: Sequence[Any], seeds: Sequence[int]) -> Batch:
        return self.trained.batch([row for example in examples for row in example.rows], seeds)

    def count(self, batch: Batch) -> float:
        return self.trained.count(batch)

    def losses(self, model: nn.Module, batches: Sequence[Batch], total: float, one_pass: Pass) -> Tensor:
        return summed(model, batches, total, one_pass)

    def evaluate(self, model: Any, at_the_end: bool) -> Evaluation | None:
        """Metrics on the held-out text of each source, and on all of it; None without any."""
        scores: dict[str, Score] = {}
        budget = None if at_the_end else self.options.eval_tokens
        for name, shards in self.data.held_out.items():
            texts = (shard[i] for shard in shards for i in range(len(shard)))
            with contextlib.suppress(InputError):  # a source may hold out a text too short to hide anything in
                scores[name] = self.evaluated.evaluate(model, texts, budget=8192, max_tokens=budget)
        if not scores:
            return None
        metrics = self._metrics(Score.mean(list(scores.values())), list(scores))
        for name, score in scores.items() if len(scores) > 1 else ():
            metrics |= {f"{key}/{name}": value for key, value in self._metrics(score, [name]).items() if key != "top5"}
        return Evaluation(metrics)

    def _metrics(self, score: Score, sources: Sequence[str]) -> dict[str, float]:
        metrics = {"loss": score.loss, "accuracy": score.top1, "top5": score.top5}
        if not isinstance(self.evaluated, MaskedLM):
            shards = [shard for name in sources for shard in self.data.held_out[name]]
            predicted = sum(len(shard.tokens) - len(shard) for shard in shards)  # all but the first token of each text
            size = sum(self.data.held_out_bytes[name] for name in sources)
            metrics["perplexity"] = math.exp(min(score.loss, 700))
            metrics["bits_per_byte"] = score.loss / math.log(2) * predicted / size
        return metrics

    def save(self, model: Any, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        self._save_tokenizer(folder)

    def save_frame(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        self._save_tokenizer(folder)

    def _save_tokenizer(self, folder: Path) -> None:
        finished = self.trained.finish_tokenizer(self.data.tokenizer)
        save_tokenizer(finished, folder, self.config.max_position_embeddings)

    def load_weights(self, model: Any, folder: Path) -> None:
        check_same(model, folder)
        model.load_state_dict(type(model).from_pretrained(folder, dtype=torch.float32).state_dict())

    def without_labels(self, batch: Batch) -> Batch:
        return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}

    def rebuild(self, weights: Mapping[str, Tensor]) -> Any:
        return filled(self.trained.model_class, self.config, weights, "the run").eval()


def pretrain(
    data: str | Path | Sequence[str | Path] | None = None,
    output: str | Path | None = None,
    *,
    settings: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> Finished:
    """Train a language model on prepared text.

    Args:
        data: folder or folders that `prepare_data` made.
        output: folder of the run. It gets checkpoints, `metrics.jsonl`, `run.yaml`, and at the end the model, its
            tokenizer, `results.json` and `report.html`.
        settings: a YAML file of options; arguments override it.
        resume: continue from the last checkpoint under `output`, with its options.
        progress: draw progress on standard error.
        say: called with each line about the run; by default they are printed with `progress`, and logged without it.
        options: see `modernbert.training.PretrainOptions`.

    Raises:
        InputError, ConfigError: an option is impossible, the data is unsuitable, or the folder is in use.
        DivergedError: the loss is NaN or infinite.
        InterruptedRunError: the process was asked to end (SIGTERM), or another one of the run is lost.
        OSError: a file cannot be read or written.
    """
    with started(
        "pretrain", PretrainOptions, {"data": data, "output": output, **options}, settings, resume=resume,
        progress=progress, say=say, free=("data", "output", "verify", "eval_tokens", "save_dtype"),
    ) as run:  # fmt: skip
        chosen, is_main = run.options, run.process.is_main_process
        # One process computes the checksums; all map the files.
        prepared = Data.open(chosen.data, chosen.verify and is_main)
        if chosen.micro_tokens < prepared.max_length:
            raise InputError(
                f"micro_tokens is {chosen.micro_tokens}, and texts of the data have up to {prepared.max_length} tokens"
            )
        objective = Pretraining(chosen, prepared)
        model = objective.model
        if resume and checkpoints(run.folder):
            check_same(model, last_checkpoint(run.folder)[0])
        stream = PassStream(prepared.train, chosen.micro_tokens, chosen.seed, chosen.weights)
        feed = PretrainFeed(stream, chosen, prepared.digest)
        sizes = ", ".join(f"{name} {size:,}" for name, size in zip(stream.names, stream.sizes, strict=True))
        if chosen.model is not None and (note := stored_in(objective.config.stored_dtype)):
            run.say(note)
        run.say(
            f"{model.num_parameters() / 1e6:.2f} M parameters; tokens: {sizes}; {feed.total} steps; "
            f"products in {products(chosen.precision, run.process.device)}"
        )
        outcome = run.fit(model, feed, objective, chosen.shard)
        result = Finished(model=outcome.model, tokenizer=prepared.tokenizer, outcome=outcome, output=run.folder)

        def save() -> None:
            finished = outcome.model
            if chosen.save_dtype != "float32":
                finished = copy.deepcopy(finished).to(getattr(torch, chosen.save_dtype))
            objective.save(finished, run.folder)

        about = {
            "model": chosen.model or f"a new {'encoder' if chosen.objective == 'mlm' else 'decoder'}",
            "parameters": outcome.model.num_parameters(),
            "train_examples": _texts(prepared.train),
            "eval_examples": _texts(prepared.held_out),
        }
        run.finish(outcome, objective.metric, save, about)
        return result


def _texts(sources: Mapping[str, Sequence[Corpus]]) -> int:
    return sum(len(shard) for shards in sources.values() for shard in shards)
