"""The encoder's heads give transformers' numbers in float32: logits, losses, gradients; and where we differ, why."""

import pytest
import torch

import modernbert
from tests.parity.configs import pair, peer, random_batch, random_config, same_loss_and_gradients

POOLINGS = ("cls", "mean")
PROBLEMS = (None, "single_label_classification", "multi_label_classification", "regression")


def text_labels(problem, texts, labels, seed):
    generator = torch.Generator().manual_seed(seed)
    if problem == "multi_label_classification":
        return torch.randint(0, 2, (texts, labels), generator=generator).float()
    if problem == "regression":
        return torch.randn((texts, labels) if labels > 1 else (texts,), generator=generator)
    return torch.randint(0, labels, (texts,), generator=generator)


@pytest.mark.parametrize("seed", range(8))
def test_sequence_classification(seed, tmp_path):
    problem = PROBLEMS[seed % 4]
    labels = 1 if seed == 3 else 2 + seed % 3
    changes = {"num_labels": labels, "classifier_pooling": POOLINGS[seed // 4], "problem_type": problem}
    values, theirs, ours = pair("ModernBertForSequenceClassification", seed, tmp_path, **changes)
    ids, mask, _ = random_batch(values, seed)
    given = {"attention_mask": mask, "labels": text_labels(problem, len(ids), labels, seed)}
    a, b = theirs(ids, **given), ours(ids, **given)
    torch.testing.assert_close(b.logits, a.logits, rtol=0, atol=1e-5)
    assert ours.config.problem_type == problem
    same_loss_and_gradients(a, b, theirs, ours)


@pytest.mark.parametrize(
    ("labels", "number", "problem"),
    [
        (torch.tensor([0.5, -1.0]), 1, "regression"),
        (torch.tensor([2, 0]), 3, "single_label_classification"),
        (torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]), 3, "multi_label_classification"),
    ],
)
def test_the_problem_is_read_off_the_labels_and_never_written_down(labels, number, problem, tmp_path):
    values, theirs, ours = pair("ModernBertForSequenceClassification", 1, tmp_path, num_labels=number)
    ids = torch.randint(3, values["vocab_size"], (2, 9))
    a, b = theirs(ids, labels=labels), ours(ids, labels=labels)
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-6, atol=1e-6)
    assert theirs.config.problem_type == problem  # transformers writes into the configuration as it computes
    assert ours.config.problem_type is None


@pytest.mark.parametrize("cls", ["ModernBertForSequenceClassification", "ModernBertForMultipleChoice"])
def test_cls_is_the_first_real_token_under_left_padding(cls, tmp_path):
    """transformers' classifier takes column 0 under left padding, which is padding; its choices do not."""
    values, theirs, ours = pair(cls, 2, tmp_path)
    ids, mask, _ = random_batch(values, 5)
    flipped = [
        torch.stack([torch.roll(r, int((m == 0).sum())) for r, m in zip(x, mask, strict=True)]) for x in (ids, mask)
    ]
    assert not torch.equal(flipped[1], mask)
    if cls == "ModernBertForMultipleChoice":
        ids, mask, flipped = ids[None], mask[None], [x[None] for x in flipped]
    right, left = ours(ids, attention_mask=mask).logits, ours(flipped[0], attention_mask=flipped[1]).logits
    assert torch.equal(right, left)
    torch.testing.assert_close(right, theirs(ids, attention_mask=mask).logits, rtol=0, atol=1e-5)
    wrong = (theirs(flipped[0], attention_mask=flipped[1]).logits - right).abs().max()
    assert (wrong > 1e-2) == (cls == "ModernBertForSequenceClassification")


@pytest.mark.parametrize("seed", range(4))
def test_token_classification(seed, tmp_path):
    values, theirs, ours = pair("ModernBertForTokenClassification", seed, tmp_path, num_labels=3 + seed)
    ids, mask, labels = random_batch(values, seed, "left" if seed % 2 else "right")
    labels = torch.where(labels >= 0, labels % (3 + seed), labels)
    a, b = (m(ids, attention_mask=mask, labels=labels) for m in (theirs, ours))
    torch.testing.assert_close(b.logits[mask.bool()], a.logits[mask.bool()], rtol=0, atol=1e-5)
    assert not b.logits[~mask.bool()].any()
    same_loss_and_gradients(a, b, theirs, ours)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_multiple_choice(pooling, tmp_path):
    seed = POOLINGS.index(pooling)
    values, theirs, ours = pair("ModernBertForMultipleChoice", seed, tmp_path, classifier_pooling=pooling)
    rows = [random_batch(values, seed + 10 * i) for i in range(6)]
    texts = [ids[0][mask[0].bool()] for ids, mask, _ in rows]
    width = max(map(len, texts))
    ids, mask = torch.zeros(2, 3, width, dtype=torch.int64), torch.zeros(2, 3, width, dtype=torch.int64)
    for i, text in enumerate(texts):
        ids[i // 3, i % 3, : len(text)], mask[i // 3, i % 3, : len(text)] = text, 1
    labels = torch.tensor([2, 0])
    a, b = (m(ids, attention_mask=mask, labels=labels) for m in (theirs, ours))
    assert b.logits.shape == (2, 3)
    torch.testing.assert_close(b.logits, a.logits, rtol=0, atol=1e-5)
    same_loss_and_gradients(a, b, theirs, ours)


@pytest.mark.parametrize("seed", range(3))
def test_question_answering(seed, tmp_path):
    values, theirs, ours = pair("ModernBertForQuestionAnswering", seed, tmp_path)
    ids = torch.randint(3, values["vocab_size"], (3, 70))
    start, end = torch.tensor([3, 69, 500]), torch.tensor([[7], [70], [12]])  # 70 and 500 are outside
    a, b = (m(ids, start_positions=start, end_positions=end) for m in (theirs, ours))
    torch.testing.assert_close(b.start_logits, a.start_logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(b.end_logits, a.end_logits, rtol=0, atol=1e-5)
    same_loss_and_gradients(a, b, theirs, ours)


def test_question_answering_does_not_count_padding(tmp_path):
    """transformers' loss normalises over the padding's scores too, so it changes with the batch; ours does not."""
    values, theirs, ours = pair("ModernBertForQuestionAnswering", 3, tmp_path)
    ids, mask, _ = random_batch(values, 5)
    lengths = mask.sum(1).tolist()
    assert len(set(lengths)) > 1
    start, end = torch.tensor([0] * len(ids)), torch.tensor([n - 1 for n in lengths])
    b = ours(ids, attention_mask=mask, start_positions=start, end_positions=end)
    alone = []
    for i, n in enumerate(lengths):
        a = theirs(ids[i : i + 1, :n], start_positions=start[i : i + 1], end_positions=end[i : i + 1])
        torch.testing.assert_close(b.start_logits[i, :n], a.start_logits[0], rtol=0, atol=1e-5)
        alone.append(a.loss)
    torch.testing.assert_close(b.loss, torch.stack(alone).mean(), rtol=1e-6, atol=1e-6)
    padded = theirs(ids, attention_mask=mask, start_positions=start, end_positions=end).loss
    assert (padded - b.loss).abs() > 1e-3
    assert (b.start_logits.argmax(1) < torch.tensor(lengths)).all()


@pytest.mark.parametrize("bias", [False, True])
def test_classifier_bias_is_the_heads(bias, tmp_path):
    """The pages call it the classifier's; the classifier of every checkpoint has a bias, and the head's dense layer
    has one where this option says so, in transformers and here."""
    values = {**random_config(0), "classifier_bias": bias}
    for model in (
        peer("ModernBertForSequenceClassification", values),
        modernbert.ModernBertForSequenceClassification(modernbert.ModernBertConfig(**values)),
    ):
        assert (model.head.dense.bias is not None) == bias
        assert model.classifier.bias is not None


@pytest.mark.parametrize("cls", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_bfloat16_is_as_close_to_float32_as_transformers(cls, tmp_path):
    values, theirs, ours = pair(f"ModernBertFor{cls}", 5, tmp_path)
    ids, mask, _ = random_batch(values, 5)
    exact = theirs(ids, attention_mask=mask)[0].detach()
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    real = mask.bool() if cls != "SequenceClassification" else slice(None)
    with torch.no_grad():
        errors = [(m(ids, attention_mask=mask)[0].float() - exact)[real].square().mean().sqrt() for m in (ours, theirs)]
    assert errors[0] < 1.25 * errors[1], errors
