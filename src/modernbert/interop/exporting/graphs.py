"""A model as a graph: two doors, the layers on packed tokens, a head.

What callers hand over is packed at the graph's own door, so that both graphs compute real tokens alone: *padded* takes
`input_ids` and `attention_mask`, *packed* takes the tokens end to end and where each text begins. The layers are the
model's own modules. Attention goes block by block: a block of queries against the keys that any of them sees, which
are those of the texts that it touches, or in a local layer its window. No mask is larger than one block's.

Shapes: B texts, S columns of a padded grid, T real tokens of all texts together, M hidden size, H heads, D head size,
N blocks of Q queries each.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.onnx import ops

from modernbert.config import Config
from modernbert.errors import InputError
from modernbert.models.base import BareModel
from modernbert.models.decoder import ModernBertDecoderForCausalLM, ModernBertDecoderForSequenceClassification
from modernbert.models.heads import (
    ModernBertForMaskedLM,
    ModernBertForMultipleChoice,
    ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
)
from modernbert.models.sentence_encoder import SentenceEncoder
from modernbert.nn.execution import Shared, rope_tables_by_kind

DOMAIN, ATTEND = "modernbert", "AttendBlocks"  # what stands for attention until `onnx.expand` writes it out
STATE = "last_state_packed"
EVERYTHING = 1 << 30  # a reach further than any text

# What each exported class is called by those who read the files, and its outputs.
TASKS: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    SentenceEncoder: ("sentence-embedding", ("last_hidden_state", "sentence_embedding")),
    ModernBertForMaskedLM: ("fill-mask", ("logits",)),
    ModernBertForSequenceClassification: ("text-classification", ("logits",)),
    ModernBertForTokenClassification: ("token-classification", ("logits",)),
    ModernBertForQuestionAnswering: ("question-answering", ("start_logits", "end_logits")),
    ModernBertForMultipleChoice: ("multiple-choice", ("logits",)),
    ModernBertDecoderForSequenceClassification: ("text-classification", ("logits",)),
    ModernBertDecoderForCausalLM: ("text-generation", ("logits",)),
    BareModel: ("feature-extraction", ("last_hidden_state",)),
}


def task_of(model: Any) -> tuple[str, tuple[str, ...]]:
    """What a model is exported as, and the names of its outputs."""
    for kind, task in TASKS.items():
        if isinstance(model, kind):
            return task
    raise InputError(f"model is a {type(model).__name__}; what is exported: {', '.join(k.__name__ for k in TASKS)}")


class Texts(NamedTuple):
    """Where the texts of a pass lie."""

    number: Any  # B; the padded graph has a text of one token more, so that no pass is without tokens
    starts: Tensor  # the first token of each text; one more entry than texts, the last one T
    text_T: Tensor
    positions_T: Tensor

    @classmethod
    def padded(cls, mask_BS: Tensor) -> tuple[Texts, Tensor]:
        """By a padded grid's mask; also the places of its tokens in the flattened grid."""
        batch, columns = mask_BS.shape
        real_BS = mask_BS != 0
        kept = torch.cat((real_BS.flatten(), torch.ones(1, dtype=torch.bool)))
        indices_T = kept.nonzero().squeeze(1)
        torch._check(indices_T.shape[0] >= 1)
        text_T = indices_T // columns
        zero = torch.zeros(1, dtype=torch.int64)
        first = torch.cat((real_BS.to(torch.int64).argmax(1), zero))
        starts = torch.cat((zero, torch.cat((real_BS.to(torch.int64).sum(1), zero + 1)).cumsum(0)))
        return cls(batch, starts, text_T, indices_T - text_T * columns - first[text_T]), indices_T

    @classmethod
    def packed(cls, starts: Tensor, tokens: Any) -> Texts:
        """By the first token of each text of a packed batch."""
        marks = torch.zeros(tokens + 1, dtype=torch.int64).scatter_add(0, starts[1:], torch.ones_like(starts[1:]))
        text_T = marks.cumsum(0)[:tokens]
        return cls(starts.shape[0] - 1, starts, text_T, torch.arange(tokens) - starts[text_T])

    def pool(self, x_TM: Tensor, mode: str) -> Tensor:
        """One vector a text, as `nn.pooling.pool` makes it; sums are products with a matrix of zeros and ones."""
        first_B, end_B = self.starts[: self.number], self.starts[1 : self.number + 1]
        length_B1 = (end_B - first_B)[:, None]
        if mode in ("cls", "last"):
            out_BM = x_TM[torch.minimum(first_B if mode == "cls" else end_B - 1, self.starts[-1] - 1).clamp(min=0)]
        elif mode == "max":
            index_TM = self.text_T[:, None].expand(x_TM.shape)
            lowest = torch.full((self.starts.shape[0] - 1, x_TM.shape[1]), torch.finfo(x_TM.dtype).min)
            out_BM = lowest.scatter_reduce(0, index_TM, x_TM, "amax")[: self.number]
        else:
            share_BT = (torch.arange(self.number)[:, None] == self.text_T).to(x_TM.dtype)
            if mode == "weighted_mean":
                share_BT = share_BT * (self.positions_T + 1).to(x_TM.dtype)
            count_B1 = share_BT.sum(1, keepdim=True).clamp(min=1)
            out_BM = share_BT @ x_TM / (count_B1.sqrt() if mode == "mean_sqrt_len" else count_B1)
        return torch.where(length_B1 > 0, out_BM, torch.zeros_like(out_BM))


class Blocks(NamedTuple):
    """How the layers of one kind attend: which keys each block of queries may see."""

    edges_N2: Tensor  # the first key that any query of the block sees, and the one after the last
    text_NQ: Tensor
    text_T: Tensor
    position_NQ: Tensor
    positions_T: Tensor
    left: int
    right: int

    @classmethod
    def of(cls, texts: Texts, reach: tuple[int | None, int | None], queries: int) -> Blocks:
        left, right = (EVERYTHING if steps is None else steps for steps in reach)
        tokens = texts.text_T.shape[0]
        number = (tokens + queries - 1) // queries
        first_N = torch.arange(number) * queries
        last_N = (first_N + (queries - 1)).clamp(max=tokens - 1)
        # Where a text's positions have gaps, a window holds fewer tokens than positions, never more.
        low_N = torch.maximum(texts.starts[texts.text_T[first_N]], first_N - left)
        high_N = torch.minimum(texts.starts[texts.text_T[last_N] + 1], last_N + (right + 1))
        text_NQ, position_NQ = (
            _filled(x_T, number * queries - tokens).reshape(number, queries)
            for x_T in (texts.text_T, texts.positions_T)
        )
        edges_N2 = torch.stack((low_N, high_N), dim=1)
        return cls(edges_N2, text_NQ, texts.text_T, position_NQ, texts.positions_T, left, right)

    def __call__(self, layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, dropout: float = 0.0) -> Tensor:
        tokens, heads, size = q_THD.shape
        number, queries = self.text_NQ.shape
        q_THD = _filled(q_THD * size**-0.5, number * queries - tokens)
        q_NHQD = q_THD.reshape(number, queries, heads, size).transpose(1, 2)
        inputs = (q_NHQD, k_THD.transpose(0, 1), v_THD.transpose(0, 1), *self[:5])
        reach: dict[str, Any] = {"left": self.left, "right": self.right}
        name = f"{DOMAIN}::{ATTEND}"
        out_NHQD = ops.symbolic(name, inputs, reach, dtype=q_THD.dtype, shape=q_NHQD.shape, version=1)
        return out_NHQD.transpose(1, 2).reshape(number * queries, heads, size)[:tokens]


def _filled(x_T: Tensor, extra: Any) -> Tensor:
    """As many more of the last as fill the last block."""
    return torch.cat((x_T, x_T[-1:].expand(extra, *x_T.shape[1:])))


class Graph(nn.Module, abc.ABC):
    """What is traced. Its parameters have the names of the checkpoint.

    Its last output is `STATE`, which is no output of the file: what rounding costs is measured there.

    Args:
        model: of a class of `TASKS`, in evaluation mode.
        queries: how many of a block. With 64 as many keys as a block of a local layer sees are three times that, at the
            reach of 64 that checkpoints have; 32 to 256 were measured, and are slower.
    """

    inputs: ClassVar[tuple[str, ...]]
    dynamic: Mapping[str, Mapping[int, str]]  # names of the sizes that change

    def __init__(self, model: Any, queries: int = 64) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        self._of = (model,)  # in a tuple, which hides it from the names of parameters
        self.queries = queries
        self.task, self.outputs = task_of(model)
        config: Config = model.config
        positions = torch.arange(config.max_position_embeddings)
        tables = rope_tables_by_kind(config, positions)
        self.rotary = nn.Module()
        self._tables: dict[str, str] = {}  # of each kind of layer, the kind whose tables it takes
        for kind, (cos, sin) in tables.items():
            same = next((other for other in self._tables if tables[other][0] is cos), None)
            self._tables[kind] = same or kind
            if same is None:
                half = config.head_dim // 2
                part = nn.Module()
                part.register_buffer("cos", cos[:, 0, :half].contiguous())
                part.register_buffer("sin", sin[:, 0, half:].contiguous())
                self.rotary.add_module(kind, part)

    @property
    def model_itself(self) -> Any:
        """What was given."""
        return self._of[0]

    @abc.abstractmethod
    def example(self) -> tuple[Tensor, ...]:
        """Inputs to trace it with."""

    def encode(self, ids_T: Tensor, texts: Texts) -> Tensor:
        """Hidden states (T, M) of packed ids."""
        model = self.model_itself
        body = model.model if isinstance(model, SentenceEncoder) else model.base_model
        tables: dict[str, tuple[Tensor, Tensor]] = {}
        for kind, source in self._tables.items():
            if source not in tables:
                part: Any = self.rotary.get_submodule(source)
                cos, sin = part.cos[texts.positions_T], part.sin[texts.positions_T]
                tables[source] = torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]
            tables[kind] = tables[source]
        shared = {
            kind: Shared(Blocks.of(texts, body.config.reach(kind), self.queries), *tables[kind])
            for kind in self._tables
        }
        hidden: Tensor = body.run_layers(body.embeddings(ids_T, None), shared)
        return hidden

    def answer(self, x_TM: Tensor, ids_T: Tensor, texts: Texts) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Outputs of tokens, and outputs of texts."""
        model = self.model_itself
        if isinstance(model, SentenceEncoder):
            vectors_TM = x_TM
            for part in model.after_tokens:
                vectors_TM = part(vectors_TM)
            pooled = torch.cat([texts.pool(vectors_TM, mode) for mode in model.settings.poolings], dim=-1)
            for part in model.after_pooling:
                pooled = part(pooled)
            return (x_TM,), (pooled[:, : model.dimensions],)
        if isinstance(model, ModernBertForMaskedLM | ModernBertDecoderForCausalLM):
            return (model.score(x_TM),), ()
        if isinstance(model, ModernBertForTokenClassification):
            return (model.classify(x_TM),), ()
        if isinstance(model, ModernBertForQuestionAnswering):
            return model.classify(x_TM).unbind(-1), ()
        if isinstance(model, ModernBertForSequenceClassification | ModernBertForMultipleChoice):
            return (), (model.classify(texts.pool(x_TM, model.config.classifier_pooling)),)
        if isinstance(model, ModernBertDecoderForSequenceClassification):
            return (), (model.classify(self._last(x_TM, ids_T, texts)),)
        return (x_TM,), ()

    def _last(self, x_TM: Tensor, ids_T: Tensor, texts: Texts) -> Tensor:
        """The state of each text's last token that is not the padding id."""
        pad = self.model_itself.config.pad_token_id
        if pad is None:
            return texts.pool(x_TM, "last")
        order_T = torch.arange(ids_T.shape[0])
        none = torch.full((texts.starts.shape[0] - 1,), -1, dtype=torch.int64)
        last = none.scatter_reduce(0, texts.text_T, torch.where(ids_T == pad, none[:1], order_T), "amax")
        first_B, end_B = texts.starts[: texts.number], texts.starts[1 : texts.number + 1]
        at_B = torch.minimum(torch.maximum(last[: texts.number], first_B), texts.starts[-1] - 1)
        return torch.where((end_B > first_B)[:, None], x_TM[at_B], torch.zeros_like(x_TM[at_B]))


class PackedGraph(Graph):
    """(T,) ids, (B + 1,) starts to outputs (T, ...) of tokens and (B, ...) of texts."""

    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "cu_seqlens")

    def __init__(self, model: Any, queries: int = 64) -> None:
        super().__init__(model, queries)
        self.dynamic = {"input_ids": {0: "tokens"}, "cu_seqlens": {0: "texts_and_one"}}

    def example(self) -> tuple[Tensor, ...]:
        return torch.ones(self.queries + 7, dtype=torch.int64), torch.tensor([0, 5, 11, self.queries + 7])

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
        texts = Texts.packed(cu_seqlens, input_ids.shape[0])
        x_TM = self.encode(input_ids, texts)
        tokens, of_texts = self.answer(x_TM, input_ids, texts)
        return (*tokens, *of_texts, x_TM)


class PaddedGraph(Graph):
    """(B, S) ids and mask to outputs (B, S, ...) of tokens and (B, ...) of texts; of multiple choice (B, C, S)."""

    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")

    def __init__(self, model: Any, queries: int = 64) -> None:
        super().__init__(model, queries)
        choices = ["num_choices"] if self.task == "multiple-choice" else []
        self.dynamic = {name: dict(enumerate(["batch_size", *choices, "sequence_length"])) for name in self.inputs}

    def example(self) -> tuple[Tensor, ...]:
        shape = (2, 3, 9) if self.task == "multiple-choice" else (3, 9)
        return torch.ones(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.int64)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        columns = input_ids.shape[-1]
        mask_BS = attention_mask.flatten(0, 1) if self.task == "multiple-choice" else attention_mask
        batch = mask_BS.shape[0]
        texts, indices_T = Texts.padded(mask_BS)
        ids_T = torch.cat((input_ids.flatten(), torch.zeros(1, dtype=torch.int64)))[indices_T]
        x_TM = self.encode(ids_T, texts)
        tokens, of_texts = self.answer(x_TM, ids_T, texts)
        real = mask_BS.flatten() != 0
        place = (real.to(torch.int64).cumsum(0) - 1).clamp(min=0)
        fill = torch.finfo(torch.float32).min if self.task == "question-answering" else 0.0
        padded = []
        for x_T in tokens:
            keep = real if x_T.dim() == 1 else real[:, None]
            padded.append(torch.where(keep, x_T[place], torch.full((), fill)).reshape(batch, columns, *x_T.shape[1:]))
        if self.task == "multiple-choice":
            of_texts = tuple(x_B1.reshape(input_ids.shape[:-1]) for x_B1 in of_texts)
        return (*padded, *of_texts, x_TM)


GRAPHS: dict[str, type[Graph]] = {"padded": PaddedGraph, "packed": PackedGraph}
