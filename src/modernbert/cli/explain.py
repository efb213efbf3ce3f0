"""`modernbert attention` and `attribution`: pages that show what a model looks at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from modernbert.errors import InputError

Text = Annotated[str, typer.Argument(help="The text to read.")]
Page = Annotated[Path, typer.Option(help="HTML file to write; it needs no other files.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file --output if it exists.")]
Model = Annotated[str | None, typer.Option(help="Folder or Hub repository. (default: the package's small model)")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda:0, or the number of a GPU. (default: cpu)")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16. (default: the checkpoint's)")]


def attention(
    text: Text,
    output: Page = Path("attention.html"),
    model: Model = None,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Draw a text's attention, layer by layer and head by head.

    Example: modernbert attention "The dog ran across the road." --output attention.html
    """
    from modernbert.auto import AutoModel
    from modernbert.io.files import write_text
    from modernbert.tools import attention_of, draw_attention

    _check_page(output, overwrite)
    loaded, tokenizer, name = _loaded(AutoModel, model, device, dtype)
    found = attention_of(loaded, tokenizer, text)
    write_text(output, draw_attention(found, f"Attention of {name}"))
    typer.echo(f"{len(found.weights)} layers, {len(found.tokens)} tokens; written to {output}")


def attribution(
    text: Text,
    output: Page = Path("attribution.html"),
    model: Model = None,
    target: Annotated[
        str | None, typer.Option(help="Label, or word at the mask. (default: the model's answer)")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Points of the sum. (default: 64, more if needed)")] = None,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Draw how much each token contributes to a label, or to the word at a mask.

    Example: modernbert attribution "The dog ran across the [MASK]." --output attribution.html
    """
    from modernbert.auto import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification, kind_of
    from modernbert.io.files import write_text
    from modernbert.pipelines import small_model
    from modernbert.tools import attribute, draw_attribution

    _check_page(output, overwrite)
    kind = kind_of(AutoConfig.from_pretrained(model or small_model()).extra)
    autos = {"masked-lm": AutoModelForMaskedLM, "sequence-classification": AutoModelForSequenceClassification}
    if kind not in autos:
        raise InputError(f"{model} is made for {kind or 'no known task'}; choose one for {' or '.join(autos)}")
    loaded, tokenizer, name = _loaded(autos[kind], model, device, dtype)
    found = attribute(loaded, tokenizer, text, target, steps)
    write_text(output, draw_attribution(found, f"Attribution of {name}"))
    parts = f"score {found.score:.3f}; attributions add up to within {abs(found.error):.4f}"
    typer.echo(f"{found.target.strip()}: {parts}; written to {output}")


def _check_page(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists before the work and not after."""
    if output.is_dir():
        raise InputError(f"{output} is a folder; name a file to write")
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists already; name another --output, or replace it with --overwrite")


def _loaded(auto: Any, model: str | None, device: str | None, dtype: str | None) -> tuple[Any, Any, str]:
    """The model, its tokenizer, and its name for a title."""
    from modernbert.pipelines import small_model
    from modernbert.text.tokenizer import Tokenizer

    if model is None:
        model, dtype, name = str(small_model()), dtype or "float32", "the small model"
    else:
        name = Path(model).name
    return auto.from_pretrained(model, device=device, dtype=dtype), Tokenizer.from_pretrained(model), name
