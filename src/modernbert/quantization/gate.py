"""Quantizing a model, and measuring what that costs before it is accepted.

Every weight is rounded; then the quantized model reads texts beside the float one. Where its states stray too far, the
weights whose errors weigh most are rounded more finely, and it reads again. Where that does not suffice, nothing is
changed.

Shapes: T tokens, M hidden size.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernbert.errors import InputError, QuantizationError
from modernbert.io.hub import Source
from modernbert.models.base import PreTrainedModel
from modernbert.models.formats import KEY
from modernbert.models.sentence_encoder import SentenceEncoder
from modernbert.nn.layers import Linear
from modernbert.quantization.calibration import (
    Batch,
    Inputs,
    Seen,
    hooked,
    look,
    make_batches,
    observe,
    own_texts,
)
from modernbert.quantization.modules import (
    QuantizedEmbedding,
    QuantizedLinear,
    put_module,
    quantized_like,
    quantized_modules,
)
from modernbert.quantization.options import BFLOAT16, SCHEMES, QuantizationConfig, Record, resolve
from modernbert.quantization.rounding import Scheme, choose_columns, round_weight
from modernbert.quantization.torchao import quantize_by_torchao
from modernbert.quantization.weight import pack_quantized
from modernbert.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
_BLOCK = 2**25 - 2**16  # bytes, just below the largest that glibc goes by


@dataclasses.dataclass(frozen=True)
class Measured:
    """What quantizing cost, on texts that scales and columns were not chosen by."""

    cosine_min: float  # between the last hidden states of both models, at the worst token
    cosine_mean: float  # over all tokens
    agreement: float | None  # share of the head's answers that are the same; None of a model without answers
    tokens: int  # how many were read

    def __str__(self) -> str:
        answers = "" if self.agreement is None else f", {self.agreement:.1%} of the answers the same"
        return (
            f"over {self.tokens:,} tokens the cosine is {self.cosine_mean:.5f}, at the worst token "
            f"{self.cosine_min:.5f}{answers}"
        )


@dataclasses.dataclass
class _Weight:
    """A weight that is quantized as one: of several layers that read the same rows, or of a tied pair."""

    names: list[str]  # its layers
    steps: tuple[Scheme, ...]  # what it may be cut into, coarsest first; then it stays bfloat16
    embeds: bool  # whether it is an embedding's, whose rows are taken one by one
    step: int = 0  # which of the steps it is now
    error: float = 0.0  # its quantization error relative to the residual stream that its layer adds to

    @property
    def scheme(self) -> Scheme | None:
        """How it is cut; None where it stays bfloat16."""
        return self.steps[self.step] if self.step < len(self.steps) else None

    def has_more_bits(self, ahead: int = 0) -> bool:
        """Whether it takes more bits than the scheme that was asked for, now or `ahead` steps later."""
        later = self.steps[self.step + ahead :]
        return not later or later[0].bits > self.steps[0].bits


@torch.no_grad()
def quantize(
    model: Any,
    quantization_config: Any = "int8",
    *,
    tokenizer: Tokenizer | None = None,
    texts: Sequence[str] | None = None,
    report: Callable[[str], None] | None = None,
) -> Any:
    """Quantize a model in place, and measure how much accuracy that costs.

    Args:
        model: of any class of this package, on the CPU; of a `SentenceEncoder`, the encoder is quantized.
        quantization_config: "int8", "int4", "int8-weight-only", "int4-weight-only", or a `QuantizationConfig`.
        tokenizer: that of the model; without it the model is measured on random ids, which says less.
        texts: like those that the model will read; a few thousand tokens suffice. By default those of the package.
        report: called with a line about each step; by default lines are logged.

    Returns:
        The model. `model.quantization` has what was measured.

    Raises:
        QuantizationError: the wanted cosine cannot be reached; the model is left unchanged.
        InputError, ValueError: it is quantized already or not on the CPU, or there is no text.
    """
    if not isinstance(model, PreTrainedModel | SentenceEncoder):
        raise InputError(f"model is a {type(model).__name__}; give a model of this package, such as AutoModel loads")
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise InputError(f"tokenizer is a {type(tokenizer).__name__}; give a Tokenizer: Tokenizer.from_pretrained(...)")
    if isinstance(texts, str):
        raise InputError("texts is a string; give a list of texts")
    if isinstance(model, SentenceEncoder):
        quantize(model.model, quantization_config, tokenizer=tokenizer, texts=texts, report=report)
        return model
    model.refuse_adapters("quantize", loaded=True)
    config, report = resolve(quantization_config), report or logger.info
    if quantized_modules(model):
        scheme = "a part of it" if model.quantization is None else model.quantization.scheme
        raise ValueError(f"the model is quantized already, as {scheme}; take the float checkpoint")
    if model.device.type != "cpu":
        raise ValueError(f"the model is on {model.device}; a model is quantized on the CPU: model.cpu()")
    if texts is not None and (tokenizer is None or not any(text.strip() for text in texts)):
        raise ValueError("texts need a tokenizer, and at least one of them must hold something")
    dtype, training = model.dtype, model.training
    # glibc keeps as much freed memory as the largest block that it was given back. Otherwise the system clears the
    # memory of each layer's states anew.
    torch.empty(_BLOCK, dtype=torch.uint8)
    model.thaw()
    model.eval().float()
    weights = _weights(model, SCHEMES[config.scheme])
    originals = {name: model.get_submodule(name) for weight in weights for name in weight.names}
    try:
        batches = make_batches(texts or own_texts(), tokenizer, model, config.tokens)
        record = _let_in(model, weights, config, batches, report)
    except BaseException:
        for name, module in originals.items():
            put_module(model, name, module)
        model.to(dtype).train(training)
        raise
    given = "the package's own" if texts is None else f"{len(texts)} given"
    record.measured["texts"] = "ids drawn at random" if tokenizer is None else given
    model.config = model.config.replace(extra={**model.config.extra, KEY: record.to_dict()})
    model.base_model.config = model.config
    model.to(dtype).requires_grad_(False)
    return model


def quantize_loaded(model: Any, config: QuantizationConfig, source: Source) -> Any:
    """Quantize a model that was just loaded: measured with the tokenizer beside it, if there is one."""
    if model.device.type != "cpu":
        return quantize_by_torchao(model, config)
    has_tokenizer = source.find("tokenizer.json") is not None
    if not has_tokenizer:
        logger.warning(
            "%s has no tokenizer.json; what quantizing costs is measured on ids drawn at random", source.name_or_folder
        )
    tokenizer = Tokenizer.from_pretrained(**source.arguments) if has_tokenizer else None
    return quantize(model, config, tokenizer=tokenizer)


def _weights(model: Any, steps: tuple[Scheme, ...]) -> list[_Weight]:
    """What is quantized: everything but norms, biases and classifiers, which are small."""
    names = {id(module): name for name, module in model.named_modules()}
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = output is not None and output.weight is embedding.weight
    vocabulary = [names[id(embedding)], *([names[id(output)]] if tied else [])]
    weights = [_Weight(vocabulary, steps, embeds=True)]
    for name, module in model.named_modules():
        owner, _, leaf = name.rpartition(".")
        if not isinstance(module, Linear) or name.startswith("classifier"):
            continue
        if leaf not in ("k_proj", "v_proj") and name not in vocabulary:  # with q_proj, or with the embedding
            shared = [name, f"{owner}.k_proj", f"{owner}.v_proj"] if leaf == "q_proj" else [name]
            weights.append(_Weight(shared, steps, embeds=False))
    return [w for w in weights if model.get_submodule(w.names[0]).weight.shape[1] % 2 == 0]


def _let_in(
    model: Any,
    weights: list[_Weight],
    config: QuantizationConfig,
    batches: tuple[list[Batch], list[Batch]],
    report: Callable[[str], None],
) -> Record:
    """Round and measure, and round more finely until the limit is reached."""
    chosen_by, measured_on = batches
    tokens = sum(len(b.asked_T) for b in chosen_by)
    products = [w.names[-1] for w in weights if isinstance(model.get_submodule(w.names[-1]), Linear)]
    report(f"calibrating on {tokens:,} tokens")
    originals = {name: model.get_submodule(name) for w in weights for name in w.names}
    inputs = observe(model, chosen_by, products, moments=weights[0].steps[0].bits == 4)
    layers = {name: layer for w in weights for name, layer in _quantized(originals, w, inputs).items()}
    reference = _weigh(model, weights, layers, measured_on)
    for name, layer in layers.items():
        put_module(model, name, layer)
    while True:
        passes = [(look(model, batch), right) for batch, right in zip(measured_on, reference, strict=True)]
        measured = compared(passes)
        report(str(measured))
        finer = _finer(weights, measured.cosine_min, config)
        if not finer and measured.cosine_min >= config.limit:
            break
        for weight in finer:
            weight.step += 1
        if not finer or sum(w.has_more_bits() for w in weights) > config.most_kept * len(weights):
            raise QuantizationError(
                f"{config.scheme} was refused: the worst token's cosine is {measured.cosine_min:.4f}, and "
                f"{config.limit} is wanted; more than {config.most_kept:.0%} of the weights would need more bits. Ask "
                "for less with min_cosine, allow more with most_kept, or choose another scheme"
            )
        del passes
        for weight in finer:
            for name, layer in _quantized(originals, weight, inputs).items():
                put_module(model, name, layer)
            report(f"rounded more finely: {', '.join(weight.names)}: {weight.scheme or BFLOAT16}")
    finer_by_name = {name: str(w.scheme or BFLOAT16) for w in weights if w.step for name in w.names}
    return Record(config.scheme, finer_by_name, {**dataclasses.asdict(measured), "layers": layers_compared(passes)})


def _finer(weights: Sequence[_Weight], reached: float, config: QuantizationConfig) -> list[_Weight]:
    """The weights to round more finely next; none if the limit is reached.

    More scales cost little: they are given until the model is twice as near as it must be. More bits are given only to
    reach what is wanted; to the embedding, the largest, last.
    """
    if reached >= (1 + config.limit) / 2:
        return []
    cheap = [w for w in weights if not w.has_more_bits(1)]
    others = [w for w in weights if w.scheme is not None] if reached < config.limit else []
    order = sorted(cheap or others, key=lambda w: (w.step, w.embeds and not cheap, -w.error))
    return order[: max(1, len(weights) // 8)]


def _quantized(originals: Mapping[str, Any], weight: _Weight, inputs: Mapping[str, Inputs]) -> dict[str, nn.Module]:
    """A weight's layers by name: quantized, or with their numbers rounded to bfloat16."""
    if weight.scheme is None:
        return _in_bfloat16(originals, weight)
    names = weight.names[:1] if weight.embeds else weight.names
    parts = [originals[name].weight.detach().float() for name in names]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    seen = inputs.get(weight.names[-1])
    columns = choose_columns(whole, None if seen is None else seen.top_I, weight.scheme)
    # What makes up for an error in products does not in the rows of an embedding.
    moments = None if seen is None or weight.embeds or weight.scheme.bits == 8 else seen.moments_II
    quantized = round_weight(whole, weight.scheme, columns, moments)
    cuts = itertools.pairwise(torch.tensor([0, *map(len, parts)]).cumsum(0).tolist())
    by_layer = [quantized] * len(weight.names) if weight.embeds else [quantized.outputs(slice(a, b)) for a, b in cuts]
    return {
        name: quantized_like(originals[name], part, torch.float32)
        for name, part in zip(weight.names, by_layer, strict=True)
    }


def _in_bfloat16(originals: Mapping[str, Any], weight: _Weight) -> dict[str, nn.Module]:
    first = originals[weight.names[0]]
    shared = nn.Parameter(first.weight.detach().bfloat16().float(), requires_grad=first.weight.requires_grad)
    layers: dict[str, nn.Module] = {}
    for name in weight.names:
        layers[name] = new = copy.copy(originals[name])
        own = shared if weight.embeds else nn.Parameter(new.weight.detach().bfloat16().float())
        new._parameters = {**new._parameters, "weight": own}
    return layers


def _weigh(
    model: Any, weights: Sequence[_Weight], layers: Mapping[str, nn.Module], batches: Sequence[Batch]
) -> list[Seen]:
    """Run the float model, and record each weight's quantization error relative to what it adds to the stream."""
    errors: dict[str, float] = dict.fromkeys(layers, 0.0)
    sizes = dict(errors)

    @functools.cache
    def multiplied(name: str) -> Callable[[Tensor], Tensor]:
        """The product by a quantized weight, without a bias."""
        layer = layers[name]
        assert isinstance(layer, QuantizedLinear)
        return layer.laid.product if layer.bias is None else pack_quantized(layer.quantized).product

    def note(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        bias = model.get_submodule(name).bias
        right = output.flatten(0, -2) if bias is None else output.flatten(0, -2) - bias
        out = multiplied(name)(inputs[0].flatten(0, -2))
        errors[name] += float(torch.linalg.vector_norm(out.sub_(right))) ** 2
        sizes[name] += float(torch.linalg.vector_norm(right)) ** 2

    with hooked(model, [name for weight in weights if not weight.embeds for name in weight.names], note):
        reference = [look(model, batch) for batch in batches]
    streams = [sum(float(seen.states[i].square().sum()) for seen in reference) for i in range(len(reference[0].states))]
    for weight in weights:
        name = weight.names[-1]
        share = 1.0
        if match := re.search(r"layers\.(\d+)\.(attn|mlp)\.", name):
            branch = f"{name[: match.end()]}Wo"
            share = sizes.get(branch, 0.0) / max(streams[int(match[1])], 1e-30)
        if weight.embeds:
            embedding, rounded = model.get_input_embeddings(), layers[weight.names[0]]
            assert isinstance(rounded, QuantizedEmbedding)
            ids = torch.cat([batch.inputs.ids_T for batch in batches if batch.inputs.ids_T is not None])
            right = embedding(ids)
            error = float(
                (rounded.quantized.to_dense(ids) - right).square().sum() / right.square().sum().clamp_min(1e-30)
            )
        else:
            error = sum(errors[n] for n in weight.names) / max(sum(sizes[n] for n in weight.names), 1e-30)
        weight.error = error * share
    return reference


def compared(passes: Iterable[tuple[Seen, Seen]]) -> Measured:
    """How near what a quantized model showed of each batch is to what the float one showed, at the last state."""
    cosines: list[Tensor] = []
    same: list[Tensor] = []
    for seen, right in passes:
        cosines.append(_cosine(seen.states[-1], right.states[-1]))
        if seen.answers is not None and right.answers is not None and len(seen.answers):
            same.append((seen.answers == right.answers).float())
    last = torch.cat(cosines)
    return Measured(
        cosine_min=round(float(last.min()), 6),
        cosine_mean=round(float(last.mean()), 6),
        agreement=round(float(torch.cat(same).mean()), 4) if same else None,
        tokens=len(last),
    )


def layers_compared(passes: Sequence[tuple[Seen, Seen]]) -> list[float]:
    """The worst token's cosine after the embedding, each layer, and the last norm."""
    of_layers = zip(*(zip(seen.states, right.states, strict=True) for seen, right in passes), strict=True)
    return [round(min(float(_cosine(a, b).min()) for a, b in pairs), 6) for pairs in of_layers]


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.float(), b.float(), dim=-1)
