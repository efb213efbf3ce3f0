"""The encoder's heads: what each one's labels are, and what it computes from packed hidden states.

To add one: a class over `EncoderWithHead` or `EncoderClassifier` with `forward`, `pack_labels` and `apply_head`, whose
constructor ends with `_finish()`; an output class in `outputs`; arguments that no other head has, in `forward`. Its
layers are called "head", "decoder" or "classifier": other names need a line in `initialization.initialize_weight`, and
one in `loading`, which must know what a checkpoint of another head may lack.

Shapes: B texts (of multiple choice: questions), C choices of each question, S columns of a padded grid, T real tokens
of all texts together, M hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from modernbert.config import ModernBertConfig
from modernbert.decoding.cache import DecoderCache
from modernbert.errors import ConfigError, InputError
from modernbert.models.encoder import ModernBertModel, ModernBertPreTrainedModel
from modernbert.models.forward import ENCODER, PACKED, Arguments, Model, forward_of
from modernbert.models.outputs import (
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from modernbert.nn.layers import Linear, PredictionHead
from modernbert.nn.losses import (
    IGNORED,
    check_classes,
    check_scores,
    cross_entropy,
    pack_text_labels,
    pack_token_labels,
    position_cross_entropy,
    text_loss,
)
from modernbert.nn.outputs import ModelOutput
from modernbert.nn.packing import PackedInputs, wrong_shape
from modernbert.nn.pooling import pool

Places = list[int | None]  # a packed token of each text, or None


class EncoderWithHead(Model, ModernBertPreTrainedModel):
    """Base of the models with an encoder in `model` and a prediction head on top."""

    def __init__(self, config: ModernBertConfig, attn_implementation: str | None = "auto") -> None:
        super().__init__(config, attn_implementation)
        self.model = ModernBertModel(config, attn_implementation)
        self.head = PredictionHead(config)

    forward = forward_of("Encode a batch and apply the head.", (*ENCODER, "labels", *PACKED, "num_items_in_batch"))


class ModernBertForMaskedLM(EncoderWithHead):
    """The encoder with a decoder over the vocabulary, whose weight is the token embedding's.

    Labels have the shape of the input: the true ids, and -100 where there is nothing to predict (what
    `sparse_pred_ignore_index` says with `sparse_prediction`).

    Logits are (B, S, V), zeros at padding, or (T, V) for packed input, or (labelled tokens, V) with
    `sparse_prediction` and labels. With labels they carry no gradient once they are repadded, unless
    `repad_logits_with_grad`.

    Arguments are those of `PreTrainedModel`. Source: ModernBERT, arXiv:2412.13663.
    """

    tied_weights: ClassVar[Mapping[str, str]] = {"decoder.weight": "model.embeddings.tok_embeddings.weight"}

    forward = forward_of(
        "Encode a batch and apply the head.",
        (*ENCODER, "labels", *PACKED, "num_items_in_batch", "sparse_prediction"),
    )

    def __init__(self, config: ModernBertConfig, attn_implementation: str | None = "auto") -> None:
        super().__init__(config, attn_implementation)
        self.decoder = Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)
        self._finish()

    def pack_labels(self, inputs: PackedInputs, given: Arguments) -> Tensor | None:
        ignored = self.config.sparse_pred_ignore_index if self.config.sparse_prediction else IGNORED
        return pack_token_labels(given.labels, inputs, self.config.vocab_size, ignored)

    def score(self, x: Tensor) -> Tensor:
        """Scores of the whole vocabulary: (N, M) to (N, V)."""
        return self.decoder(self.head(x))

    def apply_head(self, x_TM: Tensor, inputs: PackedInputs, labels: Tensor | None, given: Arguments) -> ModelOutput:
        if labels is None:
            return MaskedLMOutput(None, inputs.restore(self.score(x_TM)))
        sparse = self.config.sparse_prediction if given.sparse_prediction is None else given.sparse_prediction
        if sparse:
            labelled = (labels != IGNORED).nonzero().squeeze(1)
            x_TM, labels = x_TM.index_select(0, labelled), labels.index_select(0, labelled)
        logits = self.score(x_TM)
        loss = cross_entropy(logits, labels, num_items=given.num_items_in_batch)
        if sparse:
            return MaskedLMOutput(loss, logits)
        if inputs.packing.grid is not None and not self.config.repad_logits_with_grad:
            logits = logits.detach()
        return MaskedLMOutput(loss, inputs.restore(logits))


class EncoderClassifier(EncoderWithHead):
    """The encoder with a prediction head, dropout and a linear classifier.

    `classifier_bias` is the head's; the classifier itself always has a bias, as checkpoints hold it.
    """

    scores: ClassVar[int | None] = None  # how many the classifier gives; None takes the configuration's `num_labels`

    def __init__(self, config: ModernBertConfig, attn_implementation: str | None = "auto") -> None:
        super().__init__(config, attn_implementation)
        self.drop = nn.Dropout(config.classifier_dropout)
        assert config.num_labels is not None
        self.classifier = Linear(config.hidden_size, self.scores or config.num_labels)
        self._finish()

    def classify(self, x: Tensor) -> Tensor:
        """Scores of tokens or pooled texts: (N, M) to (N, labels)."""
        return self.classifier(self.drop(self.head(x)))

    def first_tokens(self, inputs: PackedInputs) -> Tensor | None:
        """What a classifier of texts reads, where it pools by first tokens; see `Model.tokens_read`."""
        packing = inputs.packing
        if self.config.classifier_pooling != "cls" or min(packing.lengths, default=0) < 1:
            return None
        return packing.cu_seqlens[:-1].long()

    def classify_texts(self, x_TM: Tensor, inputs: PackedInputs) -> Tensor:
        """Scores of texts, pooled as `classifier_pooling` says: (T, M) to (B, labels)."""
        return self.classify(pool(x_TM, inputs.packing.spans, self.config.classifier_pooling))


class ModernBertForSequenceClassification(EncoderClassifier):
    """The encoder with a classifier of whole texts.

    A text is pooled as `classifier_pooling` says, its first real token or the mean of its real tokens, and logits are
    (B, `num_labels`). The loss follows `problem_type`, or if that is not given the labels: one label is regression
    (squared error), whole numbers are one class a text (cross-entropy, -100 ignored), anything else is several classes
    a text (binary cross-entropy). Labels are (B,) class numbers or values, or (B, `num_labels`).

    Arguments are those of `PreTrainedModel`. Source: ModernBERT, arXiv:2412.13663, and the reference's head.
    """

    def pack_labels(self, inputs: PackedInputs, given: Arguments) -> Tensor | None:
        return pack_text_labels(given.labels, inputs, self.config)

    def tokens_read(self, inputs: PackedInputs) -> Tensor | None:
        return self.first_tokens(inputs)

    def apply_head(self, x_TM: Tensor, inputs: PackedInputs, labels: Tensor | None, given: Arguments) -> ModelOutput:
        logits = self.classify_texts(x_TM, inputs)
        return SequenceClassifierOutput(text_loss(logits, labels, self.config, given.num_items_in_batch), logits)

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        """See `Model`."""
        return self._text_loss


class ModernBertForTokenClassification(EncoderClassifier):
    """The encoder with a classifier of every token, such as of named entities.

    Logits are (B, S, `num_labels`), zeros at padding, or (T, `num_labels`) for packed input. Labels have the shape of
    the input: class numbers, and -100 at tokens that do not count; the loss is cross-entropy.

    Arguments are those of `PreTrainedModel`. Source: ModernBERT, arXiv:2412.13663, and the reference's head.
    """

    def pack_labels(self, inputs: PackedInputs, given: Arguments) -> Tensor | None:
        assert self.config.num_labels is not None
        return pack_token_labels(given.labels, inputs, self.config.num_labels)

    def apply_head(self, x_TM: Tensor, inputs: PackedInputs, labels: Tensor | None, given: Arguments) -> ModelOutput:
        logits = self.classify(x_TM)
        if labels is not None:
            check_scores(logits, self.config)
        loss = None if labels is None else cross_entropy(logits, labels, num_items=given.num_items_in_batch)
        return TokenClassifierOutput(loss, inputs.restore(logits))


class ModernBertForQuestionAnswering(EncoderClassifier):
    """The encoder with two scores a token: that an answer begins there, and that it ends there.

    The loss is the mean of the cross-entropies of both places, each over the real tokens of its text alone, so that it
    does not change with padding. Logits at padding are the lowest finite number.

    Arguments are those of `PreTrainedModel`; the configuration has `num_labels` 2. Source: ModernBERT,
    arXiv:2412.13663, and the reference's head.
    """

    def __init__(self, config: ModernBertConfig, attn_implementation: str | None = "auto") -> None:
        if isinstance(config, ModernBertConfig) and config.num_labels != 2:
            raise ConfigError(f"num_labels is {config.num_labels}; question answering needs 2, a start and an end")
        super().__init__(config, attn_implementation)

    forward = forward_of(
        "Score every token as the answer's first and last one.",
        (*ENCODER[:4], "start_positions", "end_positions", *PACKED, "inputs_embeds", "num_items_in_batch"),
        instead={"labels": "question answering takes start_positions and end_positions instead"},
    )

    def pack_labels(self, inputs: PackedInputs, given: Arguments) -> tuple[Places, Places] | None:
        """For each text the packed tokens where the answer begins and ends, None where not counted."""
        start, end = given.start_positions, given.end_positions
        if start is None and end is None:
            return None
        if start is None or end is None:
            which = "end_positions" if start is not None else "start_positions"
            raise InputError(f"{which} is missing; give both start_positions and end_positions, or neither")
        return _places("start_positions", start, inputs), _places("end_positions", end, inputs)

    def apply_head(
        self, x_TM: Tensor, inputs: PackedInputs, labels: tuple[Places, Places] | None, given: Arguments
    ) -> ModelOutput:
        start_T, end_T = self.classify(x_TM).unbind(-1)
        loss = None
        if labels is not None:
            spans, items = inputs.packing.spans, given.num_items_in_batch
            start = position_cross_entropy(start_T, spans, labels[0], num_items=items)
            end = position_cross_entropy(end_T, spans, labels[1], num_items=items)
            loss = (start + end) / 2
        lowest = torch.finfo(start_T.dtype).min
        return QuestionAnsweringModelOutput(loss, inputs.restore(start_T, lowest), inputs.restore(end_T, lowest))

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        """See `Model`."""
        return self._position_loss

    def _position_loss(
        self, start_logits: Tensor, end_logits: Tensor, start_positions: Tensor, end_positions: Tensor, **others: Any
    ) -> Tensor:
        start, end = (
            self._token_loss(logits, at.masked_fill((at < 0) | (at >= logits.shape[1]), IGNORED))
            for logits, at in ((start_logits, start_positions), (end_logits, end_positions))
        )
        return (start + end) / 2


class ModernBertForMultipleChoice(EncoderClassifier):
    """The encoder with one score a choice.

    `input_ids`, `attention_mask` and `position_ids` are (B, C, S), `inputs_embeds` (B, C, S, M), and logits (B, C).
    Labels are (B,), the number of the right choice (-100 is ignored); the loss is cross-entropy over a question's
    choices.

    Packed input holds the choices of all questions as texts one after another; `num_choices` says how many there are
    of each question, a number or one a question. Questions with fewer choices than others have the lowest finite
    number in the logits of those they lack.

    Arguments are those of `PreTrainedModel`. Source: ModernBERT, arXiv:2412.13663, and the reference's head.
    """

    scores = 1

    forward = forward_of(
        """Score the choices of each question.

        Padded arguments have a dimension of choices after the first.""",
        (*ENCODER, "labels", *PACKED, "num_items_in_batch", "num_choices"),
    )

    def open(self, given: Arguments) -> tuple[PackedInputs, DecoderCache | None]:
        """The choices of all questions as texts one after another."""
        choices, dims = given.num_choices, ["batch", "choices", "sequence"]
        name, x = "input_ids", given.input_ids
        if x is None:
            name, x, dims = "inputs_embeds", given.inputs_embeds, [*dims, "hidden"]
        if given.cu_seqlens is not None:
            given.num_choices = given.cu_seqlens.numel() - 1 if choices is None else choices
        elif x is not None:
            shape = tuple(x.shape)
            if len(shape) != len(dims):
                raise InputError(
                    f"{name} has shape {shape}; it must be ({', '.join(dims)}), or packed together with cu_seqlens"
                )
            if choices is not None and choices != shape[1]:
                raise InputError(f"num_choices is {choices}; the input's shape says {shape[1]}")
            given.num_choices = shape[1] if shape[0] else ()
            grid, square = shape[:3], (*shape[:2], 1, shape[2], shape[2])
            flat = (shape[0] * shape[1], *square[2:])  # as transformers takes it
            if (positions := given.position_ids) is not None:
                if tuple(positions.shape) in (shape[2:3], (1, shape[2])):
                    given.position_ids = positions.expand(grid)
                if given.attention_mask is None:  # each choice is one text, whatever its positions
                    given.attention_mask = torch.ones(grid)
            allowed = {"attention_mask": (grid,), "position_ids": (grid,), "sliding_window_mask": (grid, square, flat)}
            for argument in (*allowed, "input_ids", "inputs_embeds"):
                if (values := getattr(given, argument)) is None:
                    continue
                if tuple(values.shape) not in allowed.get(argument, (tuple(values.shape),)):
                    raise wrong_shape(argument, values, *allowed[argument])
                is_flat = argument == "sliding_window_mask" and tuple(values.shape) == flat
                setattr(given, argument, values if is_flat else values.flatten(0, 1))
        return super().open(given)

    def pack_labels(self, inputs: PackedInputs, given: Arguments) -> Tensor | None:
        """The number of the right choice of each question, (B,)."""
        labels, counts = given.labels, _counts(given.num_choices, len(inputs.packing.lengths))
        if labels is None:
            return None
        if tuple(labels.shape) not in ((len(counts),), (len(counts), 1)):
            raise wrong_shape("labels", labels, (len(counts),))
        right = check_classes(labels.flatten(), max(counts, default=0))
        for question, (label, count) in enumerate(zip(right.tolist(), counts, strict=True)):
            if label >= count:
                raise InputError(f"labels holds {label} for question {question}, which has {count} choices")
        return right

    def tokens_read(self, inputs: PackedInputs) -> Tensor | None:
        return self.first_tokens(inputs)

    def apply_head(self, x_TM: Tensor, inputs: PackedInputs, labels: Tensor | None, given: Arguments) -> ModelOutput:
        counts = _counts(given.num_choices, len(inputs.packing.lengths))
        logits = _by_question(self.classify_texts(x_TM, inputs).squeeze(1), counts)
        loss = None if labels is None else cross_entropy(logits, labels, num_items=given.num_items_in_batch)
        return MultipleChoiceModelOutput(loss, logits)


def _places(name: str, columns: Tensor, inputs: PackedInputs) -> Places:
    """The packed token at one column of each text, None if its text has no real token there."""
    packing = inputs.packing
    texts = len(packing.lengths)
    if tuple(columns.shape) not in ((texts,), (texts, 1)) or columns.is_floating_point():
        raise InputError(
            f"{name} has shape {tuple(columns.shape)} and dtype {columns.dtype}; with this input it must be whole "
            f"numbers of shape ({texts},)"
        )
    wanted = columns.flatten().tolist()
    if inputs.came_packed:
        found = zip(wanted, packing.spans, strict=True)
        return [start + place if 0 <= place < end - start else None for place, (start, end) in found]
    assert packing.indices_T is not None
    token_at = {place: token for token, place in enumerate(packing.indices_T.tolist())}
    width = inputs.outer_shape[1]
    return [token_at.get(text * width + c) if 0 <= c < width else None for text, c in enumerate(wanted)]


def _counts(num_choices: int | Sequence[int] | None, texts: int) -> list[int]:
    """How many choices each question has; all are of one question if `num_choices` is not given."""
    if isinstance(num_choices, int):
        if num_choices < 1 or texts % num_choices:
            raise InputError(f"num_choices is {num_choices}; the input holds {texts} choices, which must be a multiple")
        return [num_choices] * (texts // num_choices)
    if num_choices is None:
        num_choices = [texts] if texts else []
    counts = [int(n) for n in num_choices]
    if sum(counts) != texts or min(counts, default=1) < 1:
        raise InputError(f"num_choices is {counts}; they must be at least 1 each and add up to the {texts} choices")
    return counts


def _by_question(scores: Tensor, counts: list[int]) -> Tensor:
    """Scores of all choices one after another to (questions, most choices)."""
    if len(set(counts)) <= 1:
        return scores.view(len(counts), counts[0] if counts else 0)
    return pad_sequence(scores.split(counts), batch_first=True, padding_value=torch.finfo(scores.dtype).min)
