"""The one forward of all models, and its arguments: each is described once, and every class shows those it takes.

Shapes: B texts, S columns of a padded grid, T real tokens of all texts together, M hidden size.
"""

from __future__ import annotations

import abc
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from modernbert.decoding.cache import DecoderCache
from modernbert.errors import InputError, shown
from modernbert.models.base import PreTrainedModel
from modernbert.models.placement import warn_once
from modernbert.nn.inputs import Inputs
from modernbert.nn.losses import cross_entropy, text_loss
from modernbert.nn.outputs import ModelOutput
from modernbert.nn.packing import PackedInputs


@dataclasses.dataclass
class Arguments(Inputs):
    """All arguments that a forward may take, with their defaults; what each means stands in `_MEANINGS`."""

    past_key_values: DecoderCache | None = None
    use_cache: bool | None = None
    labels: Tensor | None = None
    start_positions: Tensor | None = None
    end_positions: Tensor | None = None
    shift_labels: Tensor | None = None
    num_items_in_batch: Tensor | float | None = None
    sparse_prediction: bool | None = None
    num_choices: int | Sequence[int] | None = None
    logits_to_keep: int | Tensor = 0
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    return_dict: bool | None = None


_MEANINGS = {
    "input_ids": "(B, S), (T,) or (1, T) token ids.",
    "attention_mask": "(B, S), nonzero at real tokens; None means that all are real.",
    "sliding_window_mask": "(B, S) or (B, 1, S, S). Local windows follow from the positions, so it is checked for its "
    "shape and changes nothing.",
    "position_ids": "positions for the rotary embedding, of the shape of the input or (1, S); None counts each text's "
    "real tokens, those in a cache included. Without a mask, and without tokens in a cache, positions that begin anew "
    "(for a decoder: that do not rise by one) begin another text in the same row, as collators that pack texts hand "
    "them over; outputs keep the input's shape.",
    "past_key_values": "a `DecoderCache`, which is changed in place and returned.",
    "inputs_embeds": "(B, S, M), (T, M) or (1, T, M), instead of `input_ids`.",
    "use_cache": "whether to return a cache; None does what the configuration says in evaluation mode, and returns "
    "none in training mode. Gradients do not reach what is in a cache.",
    "cache_position": "(S,) columns of the input counted from the first text's beginning; checked, and otherwise "
    "known from the cache.",
    "labels": "what the head should predict, in the form that the class describes; the output then has a loss.",
    "start_positions": "(B,) columns of the padded input, or places in the texts of packed input, of each answer's "
    "first token. A place outside of the text's real tokens is not counted.",
    "end_positions": "likewise, of each answer's last token.",
    "logits_to_keep": "score this number of last columns only, or the columns of this tensor; 0 scores all. Of packed "
    "input, that number of last tokens of each text, or the tokens at these places.",
    "indices": "(T,) the place of each packed token in the flattened grid.",
    "cu_seqlens": "(B + 1,) cumulative lengths of packed texts, from 0 to T.",
    "max_seqlen": "longest text of a packed batch, checked against `cu_seqlens`.",
    "batch_size": "B of the grid that packed outputs are padded to.",
    "seq_len": "S of that grid.",
    "output_attentions": 'return attention weights, for which "eager" attends in this call.',
    "output_hidden_states": "return the embeddings and every layer's output, the last one normed.",
    "return_dict": "False returns a plain tuple.",
    "num_items_in_batch": "labels of the whole batch when this call sees a part of it; the loss is then the sum over "
    "the labels divided by this.",
    "sparse_prediction": "whether logits are computed at labelled tokens only; the configuration's field if not given.",
    "num_choices": "choices of each question, for packed input, a number or one a question; one question if not given.",
    "kwargs": "what callers hand over out of habit: `token_type_ids` and `seq_idx` change nothing, `cu_seq_lens_q` and "
    "`max_length_q` are `cu_seqlens` and `max_seqlen`, and what a class has no use for may be None.",
}

# What callers hand over out of habit: names of other libraries for arguments, what changes nothing (with a line of log
# where something was meant), and what is refused unless it is None.
_SAME = {
    **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), "cu_seqlens"),
    **dict.fromkeys(("max_length_q", "max_length_k"), "max_seqlen"),
    "num_logits_to_keep": "logits_to_keep",
    "shift_labels": "shift_labels",
    "cache": "past_key_values",
}
_HARMLESS = {
    **dict.fromkeys(("token_type_ids", "seq_idx", "num_items_in_batch", "sparse_prediction"), ""),
    **dict.fromkeys(("use_cache", "cache_position"), "an encoder has no cache, so it changes nothing"),
}
_ONLY_NONE = {
    "head_mask": "attention heads are removed by model.prune_heads",
    "past_key_values": "an encoder sees whole texts, and has no cache",
    **dict.fromkeys(("encoder_hidden_states", "encoder_attention_mask"), "there is no cross-attention"),
    "labels": "{name} has no head and no loss; AutoModelForSequenceClassification, AutoModelForMaskedLM, "
    "AutoModelForCausalLM and the like have",
    "shift_labels": "only a ModernBertDecoderForCausalLM shifts labels; give labels",
    "logits_to_keep": "{name} scores no vocabulary token by token; leave it out",
}

# What more there is to say of models with a cache.
_WITH_CACHE = {
    "input_ids": " With `past_key_values` the new ones alone.",
    "attention_mask": " With a cache it may also be (B, columns before + S), of which the last S count.",
}

# In the reference's order; a head's own arguments stand before PACKED, what the reference lacks at the end.
ENCODER = ("input_ids", "attention_mask", "sliding_window_mask", "position_ids", "inputs_embeds")
DECODER = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
PACKED = (
    *("indices", "cu_seqlens", "max_seqlen", "batch_size", "seq_len"),
    *("output_attentions", "output_hidden_states", "return_dict"),
)


class Model(PreTrainedModel, abc.ABC):
    """A model that makes named outputs of a caller's batch: what `forward` asks of every class."""

    def open(self, given: Arguments) -> tuple[PackedInputs, DecoderCache | None]:
        """Check what the caller gave, and pack it; a decoder opens its cache as well."""
        return self.base_model.pack_inputs(given), None

    def pack_labels(self, inputs: PackedInputs, given: Arguments) -> Any:
        """Check the labels and bring them into the form that `apply_head` takes, before anything is computed."""

    def tokens_read(self, inputs: PackedInputs) -> Tensor | None:
        """The one token of each text whose last state the head reads, (B,); None where it reads more."""
        return None

    def run_packed(
        self, inputs: PackedInputs, given: Arguments | None = None, cache: DecoderCache | None = None
    ) -> ModelOutput:
        """The output of a packed batch on the model's device; `given` has labels and options."""
        given = given or Arguments()
        labels, body = self.pack_labels(inputs, given), self.base_model
        rows = self.tokens_read(inputs) if body.can_leave_out(inputs, given.output_hidden_states) else None
        hidden = body.encode(inputs, given.output_attentions, given.output_hidden_states, cache, rows=rows)
        if rows is not None:  # one token a text is left
            inputs = PackedInputs.of_rows([[0]] * len(rows), rows.device)
        output = self.apply_head(hidden.last_TM, inputs, labels, given)
        if cache is not None:
            output["past_key_values"] = cache
        output["hidden_states"], output["attentions"] = hidden.states or None, hidden.weights or None
        return output

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        """The head's loss of logits and labels, for a caller's own loop; the arguments are those of transformers."""
        return self._token_loss

    def _token_loss(self, logits: Tensor, labels: Tensor, *, num_items_in_batch: Any = None, **others: Any) -> Tensor:
        return cross_entropy(logits.flatten(0, -2), labels.flatten(), num_items=num_items_in_batch)

    def _text_loss(
        self, labels: Tensor, pooled_logits: Tensor, *, num_items_in_batch: Any = None, **others: Any
    ) -> Tensor:
        loss = text_loss(pooled_logits, labels, self.config, num_items_in_batch)
        assert loss is not None
        return loss

    @abc.abstractmethod
    def apply_head(self, x_TM: Tensor, inputs: PackedInputs, labels: Any, given: Arguments) -> ModelOutput:
        """The output of packed hidden states (T, M), with a loss where there are labels."""


def forward_of(
    summary: str,
    names: Sequence[str],
    instead: Mapping[str, str] = MappingProxyType({}),
    unshown: Sequence[str] = (),
) -> Callable[..., Any]:
    """The forward of a class, which shows its own arguments in `help` and `inspect.signature`.

    `names` are its arguments, in order; `instead` are some that it refuses, each with what it takes instead; `unshown`
    are some that it takes and does not show, since trainers want a value of each label that is shown.
    """
    types, kind = typing.get_type_hints(Arguments), inspect.Parameter.POSITIONAL_OR_KEYWORD
    own = [inspect.Parameter(n, kind, default=getattr(Arguments, n), annotation=types[n]) for n in names]
    rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD, annotation=Any)
    signature = inspect.Signature([*own, rest], return_annotation=ModelOutput | tuple)

    def forward(self: Model, *args: Any, **kwargs: Any) -> ModelOutput | tuple[Any, ...]:
        named = signature.bind(*args, **kwargs).arguments
        if others := named.pop("kwargs", None):
            named |= _by_habit(type(self).__name__, others, named, (*names, *unshown), instead)
        given = Arguments(**named)
        inputs, cache = self.open(given)
        output = self.run_packed(inputs, given, cache)
        named_output = self.config.return_dict if given.return_dict is None else given.return_dict
        return output if named_output else output.to_tuple()

    described = []
    for name in (*names, "kwargs"):
        meaning = f"{name}: {_MEANINGS[name]}{_WITH_CACHE.get(name, '') if 'past_key_values' in names else ''}"
        described.append(textwrap.fill(meaning, 110, initial_indent=" " * 4, subsequent_indent=" " * 8))
    raises = "Raises:\n    InputError: arguments contradict each other or have the wrong shape."
    forward.__doc__ = "\n".join([inspect.cleandoc(summary), "", "Args:", *described, "", raises])
    vars(forward)["__signature__"] = signature.replace(parameters=[inspect.Parameter("self", kind), *own, rest])
    return forward


def _by_habit(
    model: str, others: dict[str, Any], named: Mapping[str, Any], names: Sequence[str], instead: Mapping[str, str]
) -> dict[str, Any]:
    """The arguments of a forward, `names`, that `others` give by names which it lacks.

    Raises:
        InputError: one would change the result, and cannot be served.
        TypeError: one is unknown.
    """
    found: dict[str, Any] = {}
    unknown = []
    for name, value in others.items():
        refusal = instead.get(name, _ONLY_NONE.get(name))
        same = _SAME.get(name)
        if same is not None and same in names:
            before = found.get(same, named.get(same))
            if before is not None and value is not None and not _agree(before, value):
                raise InputError(f"{name} is {shown(value)} and {same} is {shown(before)}; they must be the same")
            found[same] = value if before is None else before
        elif name in _HARMLESS:
            if _HARMLESS[name] and value is not None and value is not False:
                warn_once(f"{name} was given to {model}; {_HARMLESS[name]}")
        elif refusal is None:
            unknown.append(name)
        elif value is not None:
            raise InputError(f"{name} is given; {refusal.format(name=model)}")
    if unknown:
        raise TypeError(f"forward got unknown arguments: {', '.join(sorted(unknown))}")
    return found


def _agree(one: Any, other: Any) -> bool:
    return torch.as_tensor(one).tolist() == torch.as_tensor(other).tolist()
