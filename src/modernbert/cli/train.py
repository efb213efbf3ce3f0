"""`modernbert train-tokenizer`, `pretrain` and `evaluate`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modernbert.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from modernbert.training.pretrain import Progress

Paths = Annotated[
    list[Path], typer.Argument(help="Files or folders of .txt (a document each) and .jsonl (a line each).")
]
HeldOut = Annotated[float, typer.Option(help="Share of the documents kept out of training.")]


def train_tokenizer(
    paths: Paths,
    output: Annotated[Path, typer.Option(help="Folder to write the tokenizer to.")],
    vocab_size: Annotated[int, typer.Option(help="Number of ids, special tokens included.")] = 8192,
    max_length: Annotated[int, typer.Option(help="Longest text of the model, in tokens.")] = 512,
    held_out: HeldOut = 0.02,
) -> None:
    """Train a byte-level BPE tokenizer with ModernBERT's special tokens on raw text."""
    from modernbert.training.text import split_documents
    from modernbert.training.train_tokenizer import save_tokenizer
    from modernbert.training.train_tokenizer import train_tokenizer as train

    documents, kept = split_documents(paths, held_out)
    _say(f"{len(documents)} documents, {sum(map(len, documents)) / 1e6:.1f} M characters; {len(kept)} kept out")
    tokenizer = train(documents, vocab_size)
    save_tokenizer(tokenizer, output, max_length)
    sample = documents[0][:20_000]
    rate = len(sample) / max(1, len(tokenizer.encode(sample).ids))
    _say(f"{tokenizer.get_vocab_size()} ids, {rate:.2f} characters a token; written to {output}")


def pretrain(
    paths: Paths,
    tokenizer: Annotated[Path, typer.Option(help="Folder with tokenizer.json.")],
    output: Annotated[Path, typer.Option(help="Folder of the run: metrics, checkpoints and the finished model.")],
    objective: Annotated[str, typer.Option(help="mlm: an encoder, by masked tokens; clm: a decoder.")] = "mlm",
    config: Annotated[Path | None, typer.Option(help="JSON file or folder with a configuration to start from.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Width of the model.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Width of the MLPs.")] = None,
    layers: Annotated[int | None, typer.Option(help="Number of layers.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads a layer.")] = None,
    initializer_range: Annotated[float | None, typer.Option(help="Standard deviation of initial weights.")] = None,
    max_length: Annotated[int, typer.Option(help="Longest text in tokens.")] = 512,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    tokens_per_step: Annotated[int, typer.Option(help="Tokens of a batch.")] = 8192,
    micro_tokens: Annotated[int, typer.Option(help="Tokens of a forward pass.")] = 4096,
    optimizer: Annotated[str, typer.Option(help="stableadamw or muon.")] = "stableadamw",
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    weight_decay: Annotated[float, typer.Option(help="Decoupled weight decay.")] = 0.1,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = 0.02,
    decay: Annotated[float, typer.Option(help="Share of the steps, the last ones, in which it falls.")] = 0.3,
    mask_rate: Annotated[float, typer.Option(help="Share of the tokens to predict.")] = 0.3,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are scaled down to this norm.")] = 1.0,
    held_out: HeldOut = 0.02,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    save_dtype: Annotated[str, typer.Option(help="Of the finished model: float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of weights, order and masks.")] = 0,
    eval_every: Annotated[int, typer.Option(help="Steps between validations.")] = 500,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 250,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:0, or a GPU's index.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run.")] = False,
) -> None:
    """Pretrain an encoder or a decoder on raw text: packed texts, each attending to itself alone."""
    from modernbert.training.data import Corpus
    from modernbert.training.pretrain import PretrainOptions, new_model
    from modernbert.training.pretrain import pretrain as train
    from modernbert.training.text import split_documents

    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "initializer_range": initializer_range,
        "max_position_embeddings": max_length,
    }
    options = PretrainOptions(
        objective=objective,
        steps=steps,
        tokens_per_step=tokens_per_step,
        micro_tokens=micro_tokens,
        optimizer=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        warmup=warmup,
        decay=decay,
        mask_rate=mask_rate,
        max_grad_norm=max_grad_norm,
        dtype=dtype,
        save_dtype=save_dtype,
        seed=seed,
        eval_every=eval_every,
        save_every=save_every,
    )
    backend = _tokenizer(tokenizer)
    model = new_model(backend, {k: v for k, v in sizes.items() if v is not None}, config, device, seed, objective)
    _say(f"{model.num_parameters() / 1e6:.2f} M parameters")
    texts, kept = split_documents(paths, held_out)
    corpus = Corpus.from_documents(texts, backend, max_length, seed)
    validation = Corpus.from_documents(kept, backend, max_length, seed)
    _say(f"{len(corpus.tokens) / 1e6:.2f} M tokens in {len(corpus)} texts; {len(validation.tokens)} tokens held out")
    with _Reporter(steps) as report:
        train(model, corpus, validation, output, options, tokenizer=backend, report=report, resume=resume)
    _say(f"written to {output}")


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository of a language model.")],
    paths: Paths,
    mask_rate: Annotated[float, typer.Option(help="Share of the tokens to hide, all behind the mask.")] = 0.15,
    held_out: Annotated[
        float,
        typer.Option(
            help="Evaluate on this share of the documents, the one that `pretrain` keeps out; 1 means on all of them."
        ),
    ] = 0.02,
    max_length: Annotated[
        int | None, typer.Option(help="Longest text in tokens; the model's context if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of cuts and masks.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda:0, or a GPU's index.")] = None,
) -> None:
    """Have a model say tokens of held-out text, masked ones or the next ones; prints one JSON object.

    Of a decoder it gives the perplexity a token and the bits a byte too, the end of each text counted.
    """
    from modernbert.auto import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
    from modernbert.tokenizer import Tokenizer
    from modernbert.training.data import Corpus
    from modernbert.training.objectives import make_objective
    from modernbert.training.text import iter_documents, split_documents

    causal = AutoConfig.from_pretrained(model).model_type == "modernbert-decoder"
    auto: Any = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    loaded = auto.from_pretrained(model, dtype=dtype, device=device).optimize_for_inference()
    tokenizer = Tokenizer.from_pretrained(model)
    texts = [d.text for d in iter_documents(paths)] if held_out >= 1 else split_documents(paths, held_out)[1]
    if not texts:
        raise InputError(f"a held-out share of {held_out} leaves no document; give more text, or --held-out 1")
    length = max_length or loaded.config.max_position_embeddings
    corpus = Corpus.from_documents(texts, tokenizer.backend, length, seed)
    score = make_objective("clm" if causal else "mlm", tokenizer.backend, mask_rate).evaluate(loaded, corpus, seed=seed)
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
        }
    typer.echo(json.dumps(result))


def _tokenizer(folder: Path) -> Tokenizer:
    from modernbert.tokenizer import Tokenizer as Loaded

    loaded = Loaded.from_pretrained(folder)
    for name in ("cls", "sep", "pad", "mask"):
        if getattr(loaded, f"{name}_token_id") is None:
            raise InputError(f"{folder} has no {name} token; `modernbert train-tokenizer` makes one that does")
    return loaded.backend


class _Reporter:
    """Progress of a run: a live bar on a terminal, a line every fifty steps elsewhere."""

    def __init__(self, steps: int) -> None:
        self.live: Any = None
        self.validated = ""
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self.live = Progress(*columns, console=Console(stderr=True))
            self.task = self.live.add_task("", total=steps)

    def __enter__(self) -> _Reporter:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, progress: Progress) -> None:
        if progress.val_loss is not None and progress.val_accuracy is not None:
            self.validated = f" · held out: loss {progress.val_loss:.3f}, {progress.val_accuracy:.1%} right"
        minutes = progress.seconds_left / 60
        line = (
            f"loss {progress.loss:.3f} · {progress.tokens_per_second:,.0f} tokens/s · {minutes:.0f} min left"
            f"{self.validated}"
        )
        if self.live is not None:
            self.live.update(self.task, completed=progress.step, description=line)
        elif progress.step % 50 == 0 or progress.step == progress.steps or progress.val_loss is not None:
            _say(f"step {progress.step}/{progress.steps} · {line}")


def _say(line: str) -> None:
    typer.echo(line, err=True)
