"""What in a text an answer rests on: integrated gradients over the token embeddings.

Every token's embedding is moved in small steps from that of the mask to its own; the gradients on the way, times the
whole move, say how much the token adds to the score. The parts add up to the difference of the two ends' scores, and
what is lacking to that is the method's error.

Shapes: S steps, L tokens of the text, M hidden size.

Source: Axiomatic Attribution for Deep Networks, arXiv:1703.01365.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from modernbert.errors import InputError, listed, shown
from modernbert.models.heads import ModernBertForMaskedLM, ModernBertForSequenceClassification
from modernbert.text.tokenizer import Tokenizer
from modernbert.tools.explain.page import encoded, filled

_LONGEST = 512
_MOST_STEPS = 1024
_TOLERANCE = 0.05  # of the difference of both ends, within which the parts are to add up


@dataclasses.dataclass(frozen=True)
class Attribution:
    """How much each token adds to a score.

    Attributes:
        tokens: what each token reads.
        scores: one a token; above 0 speaks for the target, below against it.
        target: the label, or the token in the place of the mask, that was scored.
        score: its probability; of a regression, its value.
        baseline: the same when every token is masked.
        error: what the scores lack to `score - baseline`.
    """

    tokens: list[str]
    scores: list[float]
    target: str
    score: float
    baseline: float
    error: float


def attribute(
    model: Any,
    tokenizer: Tokenizer,
    text: str,
    target: str | None = None,
    steps: int | None = None,
    longest: int = _LONGEST,
) -> Attribution:
    """Attribute an answer to the tokens of a text.

    Args:
        model: a sequence classifier, or a masked language model, whose first mask is then explained.
        tokenizer: its tokenizer.
        text: the text.
        target: a label of the classifier, or a token for the mask; None takes the model's own answer.
        steps: points between the masked text and the text; None takes 64, and twice as many up to 1,024 until the parts
            add up within a twentieth of the difference.
        longest: tokens that are allowed.

    Raises:
        InputError: the model is of another kind, the target is unknown, or the text is empty, too long, or without a
            mask where one is needed.
    """
    if not isinstance(model, ModernBertForSequenceClassification | ModernBertForMaskedLM):
        raise InputError(f"attribution needs a sequence classifier or a masked LM; this is a {type(model).__name__}")
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise InputError(f"steps is {steps!r}; it must be a whole number of at least 1")
    if tokenizer.mask_token_id is None:
        raise InputError("attribution starts from masked tokens; this tokenizer has no mask token")
    encoding, tokens = encoded(tokenizer, text, longest)
    ids_L = torch.tensor(encoding.ids, device=model.device)
    special_L = torch.tensor(encoding.special_tokens_mask, device=model.device).bool()
    model.eval()
    table = model.get_input_embeddings()
    place = _mask_place(model, tokenizer, encoding.ids)
    with torch.no_grad():
        own_LM = table(ids_L)
        masked_LM = torch.where(special_L[:, None], own_LM, table(torch.full_like(ids_L, tokenizer.mask_token_id)))
        ends = _probabilities(model, torch.stack([own_LM, masked_LM]), place)
    chosen, name = _target(model, tokenizer, target, ends[0])
    score, baseline = (float(x) for x in ends[:, chosen])
    points = steps or 64
    while True:
        parts_L = _integrated(model, masked_LM, own_LM, place, chosen, points)
        error = score - baseline - float(parts_L.sum())
        if steps is not None or abs(error) <= _TOLERANCE * abs(score - baseline) or points >= _MOST_STEPS:
            return Attribution(tokens, parts_L.tolist(), name, score, baseline, error)
        points *= 2


def _integrated(model: Any, from_LM: Tensor, to_LM: Tensor, place: int | None, chosen: int, points: int) -> Tensor:
    """What each token adds to the score between two texts of embeddings, (L,), by the midpoint rule."""
    total_LM = torch.zeros_like(to_LM, dtype=torch.float64)
    at_once = max(1, 4096 // len(to_LM))
    with torch.enable_grad():
        for some_S in ((torch.arange(points, device=to_LM.device) + 0.5) / points).split(at_once):
            path_SLM = from_LM + some_S[:, None, None].to(to_LM.dtype) * (to_LM - from_LM)
            path_SLM = path_SLM.detach().requires_grad_(True)
            score = _probabilities(model, path_SLM, place)[:, chosen].sum()
            (gradient_SLM,) = torch.autograd.grad(score, path_SLM)
            total_LM += gradient_SLM.double().sum(0)
    return (total_LM / points * (to_LM - from_LM)).sum(-1)


def _probabilities(model: Any, embeds_SLM: Tensor, place: int | None) -> Tensor:
    """Scores of each copy of the text, (S, classes): of the labels, or of the tokens at the mask."""
    copies, length, _ = embeds_SLM.shape
    cu_seqlens = torch.arange(copies + 1, device=embeds_SLM.device) * length
    packed = {"inputs_embeds": embeds_SLM.flatten(0, 1), "cu_seqlens": cu_seqlens}
    if place is not None:
        states_TM = model.model(**packed).last_hidden_state
        logits = model.decoder(model.head(states_TM[place::length]))
    else:
        logits = model(**packed).logits
        config = model.config
        if config.problem_type == "regression":
            return logits.float()
        if config.problem_type == "multi_label_classification" or config.num_labels == 1:
            return logits.float().sigmoid()
    return logits.float().softmax(-1)


def _mask_place(model: Any, tokenizer: Tokenizer, ids: list[int]) -> int | None:
    """Where the first mask stands, for models that fill it."""
    if not isinstance(model, ModernBertForMaskedLM):
        return None
    if tokenizer.mask_token_id not in ids:
        raise InputError(f"there is no {tokenizer.mask_token} in the text; write it where a word is missing")
    return ids.index(tokenizer.mask_token_id)


def _target(model: Any, tokenizer: Tokenizer, target: str | None, scores: Tensor) -> tuple[int, str]:
    """Number and name of what is scored."""
    if isinstance(model, ModernBertForSequenceClassification):
        labels = model.config.id2label or {}
        if target is None:
            best = int(scores.argmax())
            return best, labels[best]
        if target not in labels.values():
            raise InputError(f"target is {shown(target)}; the model's labels are {listed(labels.values(), 20)}")
        return next(i for i, label in labels.items() if label == target), target
    if target is None:
        best = int(scores.argmax())
    else:
        spellings = (f" {target.strip()}", target.strip())  # words within a text are spelled with the space before
        tokens = [tokenizer(spelled, add_special_tokens=False).input_ids for spelled in spellings]
        ids = next((ids for ids in tokens if len(ids) == 1), tokens[0])
        if len(ids) != 1:
            raise InputError(
                f"target is {shown(target)}, which is {len(ids)} tokens of this vocabulary; give one of one token"
            )
        best = ids[0]
    return best, tokenizer.decode([best])


def draw_attribution(found: Attribution, title: str = "Attribution") -> str:
    """A page with the text, each token coloured by what it adds, and the figures beside it.

    Args:
        found: what `attribute` gave.
        title: of the page.

    Returns:
        HTML that stands alone: no network, no other file.
    """
    return filled("attribution.html", title, dataclasses.asdict(found))
