"""Which tokens of a text an answer rests on: integrated gradients over the token embeddings.

Every token's embedding is moved in small steps from that of the mask to its own; the gradients on the way, times the
whole move, say how much the token adds to the score. The parts add up to the difference of the scores at both ends, but
for the error of the method.

Shapes: S steps, L tokens of the text, M hidden size.

Source: Axiomatic Attribution for Deep Networks, arXiv:1703.01365.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from modernbert.checks import Limits, check_value
from modernbert.errors import InputError, listed, shown
from modernbert.models.heads import ModernBertForMaskedLM, ModernBertForSequenceClassification
from modernbert.text.tokenizer import Tokenizer
from modernbert.tools.page import encoded, filled

_FEWEST_STEPS, _MOST_STEPS = 64, 1024
_TOLERANCE = 0.05  # share of the difference of both ends within which the parts are to add up
_BUDGET = 4096  # tokens of a forward pass


@dataclasses.dataclass(frozen=True)
class Attribution:
    """How much each token adds to a score.

    Attributes:
        tokens: the text of each token.
        scores: one for each token; above 0 speaks for the target, below against it.
        target: the label, or the token for the mask, that was scored.
        score: its probability; of a regression, its value.
        baseline: the same when every token is masked.
        error: `score - baseline` less the sum of `scores`.
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
    longest: int = 512,
) -> Attribution:
    """Attribute an answer to the tokens of a text.

    Args:
        model: a sequence classifier, or a masked language model, whose answer at the first mask is then explained.
        tokenizer: its tokenizer.
        text: the text.
        target: a label of the classifier, or a token for the mask; None takes the model's own answer.
        steps: points between the masked text and the text; None takes 64, and doubles them up to 1,024 until the parts
            add up within a twentieth of the difference.
        longest: how many tokens are allowed.

    Raises:
        InputError: the model is of another kind, the target is unknown, or the text is empty, too long, or without a
            mask if one is needed.
    """
    if not isinstance(model, ModernBertForSequenceClassification | ModernBertForMaskedLM):
        raise InputError(f"attribution needs a sequence classifier or a masked LM; this is a {type(model).__name__}")
    steps = check_value("steps", steps, int | None, {"limits": Limits(least=1)})
    mask = tokenizer.mask_token_id
    if mask is None:
        raise InputError("attribution starts from masked tokens; this tokenizer has no mask token")
    encoding, tokens = encoded(tokenizer, text, longest)
    place = None
    if isinstance(model, ModernBertForMaskedLM):
        if mask not in encoding.ids:
            raise InputError(f"there is no {tokenizer.mask_token} in the text; write it where a word is missing")
        place = encoding.ids.index(mask)
    ids_L = torch.tensor(encoding.ids, device=model.device)
    special_L = torch.tensor(encoding.special_tokens_mask, device=model.device).bool()
    table = model.eval().get_input_embeddings()
    with torch.no_grad():
        own_LM = table(ids_L)
        masked_LM = torch.where(special_L[:, None], own_LM, table(torch.full_like(ids_L, mask)))
        ends = _probabilities(model, torch.stack([own_LM, masked_LM]), place)
    find = _label if place is None else _token
    chosen, name = find(model, tokenizer, target, int(ends[0].argmax()))
    score, baseline = (float(x) for x in ends[:, chosen])
    points = steps or _FEWEST_STEPS
    while True:
        parts_L = _integrated(model, masked_LM, own_LM, place, chosen, points)
        error = score - baseline - float(parts_L.sum())
        if steps is not None or abs(error) <= _TOLERANCE * abs(score - baseline) or points >= _MOST_STEPS:
            return Attribution(tokens, parts_L.tolist(), name, score, baseline, error)
        points *= 2


def _integrated(model: Any, from_LM: Tensor, to_LM: Tensor, place: int | None, chosen: int, points: int) -> Tensor:
    """What each token adds to the score between two texts of embeddings, (L,), by the midpoint rule."""
    total_LM = torch.zeros_like(to_LM, dtype=torch.float64)
    with torch.enable_grad():
        shares_S = (torch.arange(points, device=to_LM.device) + 0.5) / points
        for part_S in shares_S.split(max(1, _BUDGET // len(to_LM))):
            path_SLM = from_LM + part_S[:, None, None].to(to_LM.dtype) * (to_LM - from_LM)
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
        return model.decoder(model.head(states_TM[place::length])).float().softmax(-1)
    logits: Tensor = model(**packed).logits.float()
    if model.config.problem_type == "regression":
        return logits
    independent = model.config.problem_type == "multi_label_classification" or model.config.num_labels == 1
    return logits.sigmoid() if independent else logits.softmax(-1)


def _label(model: Any, tokenizer: Tokenizer, target: str | None, best: int) -> tuple[int, str]:
    """Number and name of the target of a classifier."""
    labels = model.config.id2label or {}
    if target is None:
        return best, labels[best]
    if target not in labels.values():
        raise InputError(f"target is {shown(target)}; the model's labels are {listed(labels.values(), 20)}")
    return next(i for i, label in labels.items() if label == target), target


def _token(model: Any, tokenizer: Tokenizer, target: str | None, best: int) -> tuple[int, str]:
    """Id and text of the target of a masked language model."""
    if target is not None:
        spellings = (f" {target.strip()}", target.strip())  # within a text a word's token begins with the space before
        tokens = [tokenizer(spelling, add_special_tokens=False).input_ids for spelling in spellings]
        ids = next((ids for ids in tokens if len(ids) == 1), tokens[0])
        if len(ids) != 1:
            raise InputError(
                f"target is {shown(target)}, which is {len(ids)} tokens of this vocabulary; it must be one"
            )
        best = ids[0]
    return best, tokenizer.decode([best])


def draw_attribution(found: Attribution, title: str = "Attribution") -> str:
    """Draw the text, each token coloured by what it adds, and the numbers beside it.

    Args:
        found: what `attribute` returned.
        title: of the page.

    Returns:
        HTML that stands alone: no network, no other file.
    """
    return filled("attribution.html", title, dataclasses.asdict(found))
