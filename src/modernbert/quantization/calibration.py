"""The texts that quantization is chosen by and measured on, as packed batches; and what the float model makes of them.

Shapes: B texts, T tokens of all texts together, M hidden size, I inputs of a weight.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modernbert.models.forward import Arguments
from modernbert.nn.packing import PackedInputs
from modernbert.text.tokenizer import Tokenizer

_LENGTH = 256  # tokens of a text at most
_BATCH = 1024
_HIDDEN = 0.15  # of the tokens of a masked language model
_MOST_MOMENTS = 4096  # inputs of a weight beyond which moments take too much memory


def own_texts() -> list[str]:
    """The texts that come with the package: prose of a century, questions, messages, lists, code."""
    text = files("modernbert").joinpath("quantization/texts.txt").read_text(encoding="utf-8")
    return [part.strip() for part in text.split("\n\n") if part.strip()]


class Batch(NamedTuple):
    """Texts packed end to end."""

    inputs: PackedInputs
    asked_T: Tensor  # (T,) whether the model's answer at a token counts


def make_batches(
    texts: Sequence[str], tokenizer: Tokenizer | None, model: Any, tokens: int
) -> tuple[list[Batch], list[Batch]]:
    """Batches to choose by, and batches to measure on: every other text each.

    Without a tokenizer the ids are drawn at random. A masked language model is asked for tokens that it does not see.
    """
    rows = _encode(texts, tokenizer, model.config, tokens)
    device = model.device
    mask_id = None if tokenizer is None or not hasattr(model, "head") else tokenizer.mask_token_id
    random = torch.Generator().manual_seed(0)
    made: tuple[list[Batch], list[Batch]] = ([], [])
    for half, batches in zip((rows[::2], rows[1::2] or rows), made, strict=True):
        for group in _grouped(half, tokens // 2):
            inputs = PackedInputs.of_rows(group)
            assert inputs.ids_T is not None
            asked_T = torch.ones_like(inputs.ids_T, dtype=torch.bool)
            if mask_id is not None and model.get_output_embeddings() is not None:
                asked_T = torch.rand(len(inputs.ids_T), generator=random) < _HIDDEN
                inputs = dataclasses.replace(inputs, ids_T=inputs.ids_T.masked_fill(asked_T, mask_id))
            batches.append(Batch(inputs.to(device), asked_T.to(device)))
    return made


def _encode(texts: Sequence[str], tokenizer: Tokenizer | None, config: Any, tokens: int) -> list[list[int]]:
    longest = min(_LENGTH, config.max_position_embeddings)
    if tokenizer is None:
        random = torch.Generator().manual_seed(0)
        return torch.randint(config.vocab_size, (max(2, tokens // 128), min(128, longest)), generator=random).tolist()
    encoded: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]
    return [row for row in encoded if row]


def _grouped(rows: list[list[int]], tokens: int) -> Iterator[list[list[int]]]:
    group: list[list[int]] = []
    for row in rows:
        if tokens <= 0:
            break
        if group and sum(map(len, group)) + len(row) > _BATCH:
            yield group
            group = []
        group.append(row)
        tokens -= len(row)
    if group:
        yield group


class Seen(NamedTuple):
    """What a model's pass over a batch showed."""

    states: list[Tensor]  # (T, M): the embedding's, each layer's, the last one normed
    answers: Tensor | None  # the best answer at each row that was asked, (N,); None where the head gives none


@torch.no_grad()
def look(model: Any, batch: Batch) -> Seen:
    one_question = [len(batch.inputs.packing.lengths)]
    output = model.run_packed(batch.inputs, Arguments(output_hidden_states=True, num_choices=one_question))
    return seen_in(output, list(output.hidden_states), batch)


def seen_in(output: Any, states: list[Tensor], batch: Batch) -> Seen:
    """What an output, whoever computed it, says of a packed batch."""
    logits, answers = getattr(output, "logits", None), None
    if getattr(output, "start_logits", None) is not None:
        pairs = (output.start_logits, output.end_logits)
        answers = torch.stack([x[a:b].argmax() for a, b in batch.inputs.packing.spans for x in pairs])
    elif logits is not None and logits.shape[-1] > 1:
        answers = (logits[batch.asked_T] if len(logits) == len(batch.asked_T) else logits).argmax(-1)
    return Seen(states, answers)


@dataclasses.dataclass
class Inputs:
    """What a weight's inputs were over many tokens."""

    top_I: Tensor  # (I,) the largest, by size
    moments_II: Tensor | None  # (I, I) sums of their products, or None where they were not wanted

    def add(self, x_TI: Tensor) -> None:
        x_TI = x_TI.flatten(0, -2).float()
        self.top_I = torch.maximum(self.top_I, torch.maximum(x_TI.amax(0), x_TI.amin(0).neg_()))
        if self.moments_II is not None:
            self.moments_II += x_TI.mT @ x_TI


def observe(model: Any, batches: Sequence[Batch], names: Sequence[str], moments: bool) -> dict[str, Inputs]:
    """The inputs of linear layers, by name, over batches. Layers that read the same rows share what was seen."""
    seen: dict[str, Inputs] = {}

    def note(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        width = inputs[0].shape[-1]
        if name not in seen:
            full = moments and width <= _MOST_MOMENTS
            seen[name] = Inputs(torch.zeros(width), torch.zeros(width, width) if full else None)
        seen[name].add(inputs[0])

    with hooked(model, names, note):
        for batch in batches:
            look(model, batch)
    return seen


@contextlib.contextmanager
def hooked(
    model: nn.Module, names: Sequence[str], call: Callable[[str, tuple[Tensor, ...], Tensor], None]
) -> Iterator[None]:
    """Have a function called with the inputs and the output of linear layers, by name."""
    with contextlib.ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)
            handle = module.register_forward_hook(lambda _, inputs, output, name=name: call(name, inputs, output))
            stack.callback(handle.remove)
        yield
