"""`modernbert train-tokenizer`, `prepare-data`, `pretrain` and `evaluate`."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from modernbert.cli.flags import Say, command, tell
from modernbert.errors import InputError
from modernbert.training.pretraining.options import PretrainOptions

Paths = Annotated[
    list[str],
    typer.Argument(
        help="Files (.txt, a document each; .jsonl and .parquet, a document a row), folders of them, folders of the "
        "datasets library, or - for standard input, a document a line. NAME=PATH gives a source a name."
    ),
]
HeldOut = Annotated[float, typer.Option(help="Share of each path's documents that is not trained on, 0 to 1.")]
Column = Annotated[str, typer.Option(help="Column of the text in .jsonl and .parquet files.")]


def train_tokenizer(
    paths: Paths,
    output: Annotated[Path, typer.Option(help="Folder to write the tokenizer to.")],
    vocab_size: Annotated[int, typer.Option(help="Size of the vocabulary, special tokens included.")] = 8192,
    max_length: Annotated[int, typer.Option(help="Longest text that the model will read, in tokens.")] = 512,
    held_out: HeldOut = 0.02,
    column: Column = "text",
) -> None:
    """Train a byte-level BPE tokenizer with ModernBERT's special tokens on raw text."""
    from modernbert.training.pretraining.documents import Collection
    from modernbert.training.pretraining.train_tokenizer import save_tokenizer
    from modernbert.training.pretraining.train_tokenizer import train_tokenizer as train

    collection = Collection(paths, held_out, column)
    if len(collection.held_out) == collection.documents:
        raise InputError(f"a held-out share of {held_out} leaves none of {collection.documents} documents to train on")
    _say(f"{collection.documents} documents, {len(collection.held_out)} held out")
    tokenizer = train((d.text for d in collection if not d.held_out), vocab_size)
    save_tokenizer(tokenizer, output, max_length)
    sample = next(d.text for d in collection if not d.held_out)[:20_000]
    rate = len(sample) / max(1, len(tokenizer.encode(sample).ids))
    _say(f"{tokenizer.get_vocab_size()} ids, {rate:.2f} characters a token; written to {output}")


def prepare_data(
    paths: Paths,
    tokenizer: Annotated[str, typer.Option(help="Folder or Hub repository of the tokenizer.")],
    output: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    max_length: Annotated[int, typer.Option(help="Longest text in tokens; longer documents become several.")] = 1024,
    held_out: HeldOut = 0.02,
    short: Annotated[float, typer.Option(help="Share of the texts, 0 to 1, made shorter than --max-length.")] = 0.0,
    column: Column = "text",
    shard_tokens: Annotated[int, typer.Option(help="About how many tokens a file of the output holds.")] = 1 << 26,
    seed: Annotated[int, typer.Option(help="Random seed of the lengths that --short chooses.")] = 0,
) -> None:
    """Tokenize raw text once, into a folder that `pretrain` reads."""
    from modernbert.pipelines.progress import bar
    from modernbert.training.pretraining.prepare import prepare_data as prepare

    began = time.perf_counter()
    progress = bar("documents")
    progress.disable = not sys.stderr.isatty()
    with progress:
        drawn = progress.add_task("documents", total=None)
        manifest = prepare(
            paths,
            tokenizer,
            output,
            max_length=max_length,
            held_out=held_out,
            short=short,
            column=column,
            shard_tokens=shard_tokens,
            seed=seed,
            report=lambda done, total: progress.update(drawn, completed=done, total=total),
        )
    for name, source in manifest.sources.items():
        texts, held = sum(shard.texts for shard in source.train), sum(shard.tokens for shard in source.held_out)
        typer.echo(
            f"{name:<24}{source.documents:>10,} documents {texts:>12,} texts {source.tokens:>15,} tokens; "
            f"held out: {source.held_out_documents:,} documents, {held:,} tokens"
        )
    total = sum(source.tokens for source in manifest.sources.values())
    took = time.perf_counter() - began
    _say(f"{total:,} tokens in {took:.1f} s, {total / took:,.0f} a second; written to {output}")


def _pretrain(say: Say, settings: Path | None, resume: bool, given: dict[str, Any]) -> None:
    from modernbert.training.pretraining.run import pretrain as train

    result = train(settings=settings, resume=resume, say=say, **given)
    tell(result.outcome, result.figures, result.output)


pretrain = command(
    "pretrain",
    PretrainOptions,
    _pretrain,
    "settings",
    "--data data --output run --hidden-size 256 --intermediate-size 384 --layers 6 --heads 4",
    ("data", "output", "objective", "model", "config"),
)


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository of a language model.")],
    paths: Paths,
    mask_rate: Annotated[float, typer.Option(help="Encoders: share of the tokens to mask.")] = 0.15,
    held_out: Annotated[
        float,
        typer.Option(help="Share of the documents to evaluate on, those that `prepare-data` holds out; 1 means all."),
    ] = 0.02,
    column: Column = "text",
    max_length: Annotated[
        int | None, typer.Option(help="Longest text in tokens. (default: the model's context)")
    ] = None,
    short: Annotated[float, typer.Option(help="Share of the texts, 0 to 1, made shorter than --max-length.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Random seed of cuts and masks.")] = 0,
    dtype: Annotated[str, typer.Option(help="Type of the weights: auto, float32 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda:0, or the number of a GPU. (default: cpu)")] = None,
) -> None:
    """Evaluate a language model on held-out text, by masked tokens or next tokens; prints one JSON object.

    A decoder's object has the perplexity per token and the bits per byte too; the end of each text counts as a token.
    """
    from modernbert.auto import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
    from modernbert.text.tokenizer import Tokenizer
    from modernbert.training.pretraining.documents import Collection
    from modernbert.training.pretraining.objectives import make_objective
    from modernbert.training.pretraining.texts import Cutter

    if not 0 < mask_rate < 1:
        raise InputError(f"mask_rate is {mask_rate}; it must lie between 0 and 1")
    causal = AutoConfig.from_pretrained(model).model_type == "modernbert-decoder"
    auto: Any = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    loaded = auto.from_pretrained(model, dtype=dtype, device=device).optimize_for_inference()
    tokenizer = Tokenizer.from_pretrained(model)
    texts = [document.text for document in Collection(paths, held_out, column) if document.held_out]
    if not texts:
        raise InputError(f"a held-out share of {held_out} leaves no document; give more text, or --held-out 1")
    length = max_length or loaded.config.max_position_embeddings
    corpus = Cutter(tokenizer.backend, length, short, seed).corpus(texts)
    objective = make_objective("clm" if causal else "mlm", tokenizer.backend, mask_rate)
    score = objective.evaluate(loaded, (corpus[i] for i in range(len(corpus))), seed=seed)
    result: dict[str, Any] = {
        "documents": len(texts),
        "tokens" if causal else "masked_tokens": score.tokens,
        "loss": round(score.loss, 4),
        "top1": round(score.top1, 4),
        "top5": round(score.top5, 4),
    }
    if causal:
        size = sum(len(text.encode()) for text in texts)
        result |= {
            "perplexity": round(math.exp(score.loss), 2),
            "bits_per_byte": round(score.loss * score.tokens / math.log(2) / size, 4),
            "perplexity_per_byte": round(math.exp(score.loss * score.tokens / size), 4),
        }
    typer.echo(json.dumps(result))


def _say(line: str) -> None:
    typer.echo(line, err=True)
