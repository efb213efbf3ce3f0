"""What a language model is trained for: which ids it reads, which it should say, and how well it does.

Shapes: T tokens of a packed batch, V vocabulary.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import torch
from tokenizers import Tokenizer, processors
from torch import Tensor

from modernbert.errors import InputError
from modernbert.models.causal_lm import ModernBertDecoderForCausalLM, next_tokens
from modernbert.models.inputs import PackedInputs
from modernbert.models.masked_lm import ModernBertForMaskedLM
from modernbert.ops.losses import IGNORED, cross_entropy
from modernbert.training.data import Corpus, token_batches
from modernbert.training.train_tokenizer import SPECIALS

LanguageModel = ModernBertForMaskedLM | ModernBertDecoderForCausalLM


@dataclasses.dataclass(frozen=True)
class Score:
    """Prediction of tokens of held-out text: mean loss in nats, and shares of the predicted tokens."""

    loss: float
    top1: float
    top5: float
    tokens: int


class Objective(abc.ABC):
    """One way to train a language model.

    Args:
        tokenizer: of the texts; it has `[CLS]`, `[SEP]`, `[PAD]` and `[MASK]`.
    """

    model_class: ClassVar[type[LanguageModel]]

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = {token: tokenizer.token_to_id(token) for token in SPECIALS}
        for token in ("[CLS]", "[SEP]", "[PAD]", "[MASK]"):
            if ids[token] is None:
                raise InputError(f"the tokenizer has no {token}; `modernbert train-tokenizer` makes one that does")
        self.special_ids = {token: i for token, i in ids.items() if i is not None}

    @classmethod
    def new_model(cls, config: dict[str, Any]) -> LanguageModel:
        """A freshly initialised model of these fields of a configuration."""
        values = cls.model_class.config_class.from_dict(config)
        model: Any = cls.model_class
        made: LanguageModel = model(values)
        return made

    @abc.abstractmethod
    def __call__(self, ids_T: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids (T,) to what the model reads and what it should say, both (T,); -100 where nothing."""

    @abc.abstractmethod
    def targets(self, inputs: PackedInputs, labels_T: Tensor) -> Tensor:
        """What each row of hidden states should say, (T,)."""

    def finish_tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer to save beside the model."""
        return tokenizer

    @torch.inference_mode()
    def evaluate(
        self,
        model: LanguageModel,
        corpus: Corpus,
        *,
        budget: int = 16384,
        seed: int = 0,
        max_tokens: int | None = None,
    ) -> Score:
        """Predict tokens of a corpus.

        Args:
            model: in any mode; it is evaluated in evaluation mode and left as it was.
            corpus: texts to predict tokens of.
            budget: tokens of a forward pass.
            seed: of order and masks.
            max_tokens: stop after about this many tokens of text; None reads the whole corpus.

        Raises:
            InputError: there is nothing to predict.
        """
        training = model.training
        model.eval()
        loss, top1, top5, count, read = 0.0, 0, 0, 0, 0
        for batch in token_batches(corpus, self, budget, seed, epochs=1):
            inputs = model.model.pack_inputs(batch.input_ids.to(model.device), None, cu_seqlens=batch.cu_seqlens)
            targets_T = self.targets(inputs, batch.labels.to(model.device))
            rows = (targets_T != IGNORED).nonzero().squeeze(1)
            if not len(rows):
                continue
            hidden = model.model.encode(inputs).last_hidden_state
            assert hidden is not None
            for some in rows.split(4096):  # logits are the largest tensor by far
                logits = model.score(hidden[some]).float()
                truth = targets_T[some]
                loss += float(cross_entropy(logits, truth, num_items=1))
                best = logits.topk(5, dim=-1).indices == truth[:, None]
                top1, top5, count = top1 + int(best[:, 0].sum()), top5 + int(best.sum()), count + len(truth)
            read += len(batch.input_ids)
            if max_tokens is not None and read >= max_tokens:
                break
        model.train(training)
        if not count:
            raise InputError("the held-out text is too short to predict anything in")
        return Score(loss / count, top1 / count, top5 / count, count)


class MaskedLM(Objective):
    """Find tokens behind the mask.

    All chosen tokens become the mask: BERT's leaving some as they are and replacing others at random does not help
    (arXiv:2202.08005).

    Args:
        tokenizer: of the texts.
        mask_rate: share of the tokens to predict; special ones are never hidden.
    """

    model_class = ModernBertForMaskedLM

    def __init__(self, tokenizer: Tokenizer, mask_rate: float) -> None:
        super().__init__(tokenizer)
        self.mask_rate = mask_rate

    def __call__(self, ids_T: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids (T,) to masked ids and labels, both (T,)."""
        special = torch.isin(ids_T, torch.tensor(list(self.special_ids.values())))
        chosen = (torch.rand(ids_T.shape, generator=generator) < self.mask_rate) & ~special
        return ids_T.masked_fill(chosen, self.special_ids["[MASK]"]), ids_T.masked_fill(~chosen, IGNORED)

    def targets(self, inputs: PackedInputs, labels_T: Tensor) -> Tensor:
        """The labels."""
        return labels_T


class CausalLM(Objective):
    """Say the next token."""

    model_class = ModernBertDecoderForCausalLM

    def __call__(self, ids_T: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids (T,) as they are, and as labels all but the first of each text, which nothing comes before."""
        return ids_T, ids_T.masked_fill(ids_T == self.special_ids["[CLS]"], IGNORED)

    def targets(self, inputs: PackedInputs, labels_T: Tensor) -> Tensor:
        """The labels of the next tokens."""
        return next_tokens(inputs, labels_T)

    def finish_tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        """A prompt is to be gone on with: texts begin with `[CLS]` and have no `[SEP]` behind them."""
        copy = Tokenizer.from_str(tokenizer.to_str())
        specials = [(t, self.special_ids[t]) for t in ("[CLS]", "[SEP]")]
        copy.post_processor = processors.TemplateProcessing(
            single="[CLS] $A", pair="[CLS] $A [SEP] $B:0", special_tokens=specials
        )
        return copy


def make_objective(name: str, tokenizer: Tokenizer, mask_rate: float) -> Objective:
    """The objective of this name: "mlm" or "clm".

    Raises:
        InputError: there is no such objective, or the tokenizer lacks a special token.
    """
    makers: dict[str, Any] = {"mlm": lambda: MaskedLM(tokenizer, mask_rate), "clm": lambda: CausalLM(tokenizer)}
    if name not in makers:
        raise InputError(f"objective is {name!r}; choose one of {', '.join(makers)}")
    made: Objective = makers[name]()
    return made
