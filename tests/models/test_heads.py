"""The encoder's heads: packed as padded, labels in either form, other numbers of labels on load, clear errors."""

import pytest
import torch

from modernbert import (
    AutoConfig,
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    ModernBertForMaskedLM,
    ModernBertForMultipleChoice,
    ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    ModernBertModel,
)
from modernbert.auto import kind_of
from modernbert.errors import CheckpointError, ConfigError, InputError
from tests.conftest import padded_batch, with_biases

LENGTHS = [3, 1, 40, 17, 0, 29]


def made(cls, config, **changes):
    return with_biases(cls(config.replace(initializer_range=0.3, **changes)).eval())


def batch(side="right"):
    return padded_batch(LENGTHS, side, more=2, seed=3)


def packed(ids, mask):
    return ids[mask.bool()], torch.tensor([0, *LENGTHS]).cumsum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("optimized", [False, True])
def test_texts_padded_packed_and_alone_agree_bit_for_bit(small_config, pooling, dtype, optimized):
    model = made(ModernBertForSequenceClassification, small_config, classifier_pooling=pooling, num_labels=3).to(dtype)
    if optimized:
        model.optimize_for_inference()
    ids, mask = batch()
    labels = torch.tensor([0, 2, 1, -100, 1, 0])
    right = model(ids, attention_mask=mask, labels=labels)
    left = model(batch("left")[0], attention_mask=batch("left")[1], labels=labels)
    ids_T, cu_seqlens = packed(ids, mask)
    flat = model(ids_T, cu_seqlens=cu_seqlens, labels=labels)
    assert torch.equal(right.logits, left.logits)
    assert torch.equal(right.logits, flat.logits)
    assert torch.equal(right.loss, flat.loss)
    assert right.logits.isfinite().all()
    for i, n in enumerate(LENGTHS):
        assert torch.equal(model(ids[i : i + 1, :n]).logits[0], right.logits[i]), n


def test_answers_padded_left_right_and_packed_agree(small_config):
    model = made(ModernBertForQuestionAnswering, small_config)
    start, end = torch.tensor([1, 0, 5, -1, 0, 28]), torch.tensor([2, 0, 39, 4, 0, 29])
    ids, mask = batch()
    right = model(ids, attention_mask=mask, start_positions=start, end_positions=end)
    ids_T, cu_seqlens = packed(ids, mask)
    flat = model(ids_T, cu_seqlens=cu_seqlens, start_positions=start, end_positions=end)
    assert torch.equal(right.loss, flat.loss)
    assert torch.equal(right.start_logits[mask.bool()], flat.start_logits)
    left_ids, left_mask = batch("left")
    moved = torch.tensor([left_mask.shape[1] - n for n in LENGTHS])
    left = model(left_ids, attention_mask=left_mask, start_positions=start + moved, end_positions=end + moved)
    assert torch.equal(right.loss, left.loss)
    assert (right.end_logits[~mask.bool()] == torch.finfo(torch.float32).min).all()
    # By hand: the places that lie inside of their texts.
    expected = []
    for places, logits in ((start, right.start_logits), (end, right.end_logits)):
        inside = [i for i, n in enumerate(LENGTHS) if 0 <= places[i] < n]
        losses = [-logits[i, : LENGTHS[i]].log_softmax(0)[places[i]] for i in inside]
        expected.append(torch.stack(losses).mean())
    torch.testing.assert_close(right.loss, (expected[0] + expected[1]) / 2)


def test_choices_padded_packed_and_ragged(small_config):
    model = made(ModernBertForMultipleChoice, small_config)
    ids, mask = batch()
    ids_T, cu_seqlens = packed(ids, mask)
    padded = model(ids.view(2, 3, -1), mask.view(2, 3, -1), labels=torch.tensor([1, 0]))
    flat = model(ids_T, cu_seqlens=cu_seqlens, num_choices=3, labels=torch.tensor([[1], [0]]))
    assert torch.equal(padded.logits, flat.logits)
    assert torch.equal(padded.loss, flat.loss)
    one = model(ids_T, cu_seqlens=cu_seqlens)
    assert one.logits.shape == (1, 6)
    ragged = model(ids_T, cu_seqlens=cu_seqlens, num_choices=[2, 4], labels=torch.tensor([1, 3]))
    assert torch.equal(ragged.logits[0, :2], one.logits[0, :2])
    assert ragged.logits.isfinite().all()
    assert ragged.logits.softmax(1)[0, 2:].sum() == 0
    expected = -(one.logits[0, :2].log_softmax(0)[1] + one.logits[0, 2:].log_softmax(0)[3]) / 2
    torch.testing.assert_close(ragged.loss, expected)
    embeds = model.get_input_embeddings()(ids)
    states = model(inputs_embeds=embeds.view(2, 3, *embeds.shape[1:]), attention_mask=mask.view(2, 3, -1))
    assert torch.equal(states.logits, padded.logits)
    assert model(ids.view(2, 3, -1), mask.view(2, 3, -1), return_dict=False)[0].shape == (2, 3)


def test_losses_add_up_over_parts_of_a_batch(small_config):
    ids, mask = batch()
    for cls, labels, counted in (
        (ModernBertForSequenceClassification, torch.tensor([0, 1, 1, 0, 1, -100]), 5),
        (ModernBertForTokenClassification, torch.where(mask.bool(), ids % 2, -100), sum(LENGTHS)),
    ):
        model = made(cls, small_config)
        whole = model(ids, attention_mask=mask, labels=labels).loss
        parts = [
            model(ids[i:j], attention_mask=mask[i:j], labels=labels[i:j], num_items_in_batch=counted).loss
            for i, j in ((0, 2), (2, 6))
        ]
        torch.testing.assert_close(sum(parts), whole)


def test_dropout_of_the_classifier_acts_in_training(small_config):
    model = made(ModernBertForSequenceClassification, small_config, classifier_dropout=0.5).train()
    ids, _ = batch()
    assert not torch.equal(model(ids[:1]).logits, model(ids[:1]).logits)


def test_another_number_of_labels_on_load_makes_a_fresh_classifier_and_says_so_once(small_config, tmp_path, log):
    model = made(ModernBertForSequenceClassification, small_config, num_labels=3)
    model.save_pretrained(tmp_path)
    assert kind_of(AutoConfig.from_pretrained(tmp_path).extra) == "sequence-classification"
    for load in (ModernBertForSequenceClassification, AutoModelForSequenceClassification):
        log.clear()
        again = load.from_pretrained(tmp_path, num_labels=5, problem_type="multi_label_classification")
        warnings = [r.getMessage() for r in log.records if r.levelname == "WARNING"]
        assert len(warnings) == 1
        assert "classifier.bias, classifier.weight; they get random values" in warnings[0]
        assert again.classifier.weight.shape == (5, 48)
        assert again.config.problem_type == "multi_label_classification"
        assert torch.equal(again.head.dense.weight, model.head.dense.weight)
        assert torch.equal(again.model.layers[2].mlp.Wi.weight, model.model.layers[2].mlp.Wi.weight)
    log.clear()
    named = AutoModelForSequenceClassification.from_pretrained(tmp_path, id2label={0: "no", 1: "maybe", 2: "yes"})
    assert named.config.label2id == {"no": 0, "maybe": 1, "yes": 2}
    assert torch.equal(named.classifier.weight, model.classifier.weight)
    assert not [r for r in log.records if r.levelname == "WARNING"]
    with pytest.raises(CheckpointError, match=r"classifier.weight is \(3, 48\), the model wants \(1, 48\)"):
        AutoModelForMultipleChoice.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="num_labels is 3; question answering needs 2"):
        AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    assert AutoModelForQuestionAnswering.from_pretrained(tmp_path, num_labels=2).classifier.weight.shape == (2, 48)


def test_heads_load_from_other_heads_and_bodies(small_config, tmp_path, log):
    ModernBertForMaskedLM(small_config).save_pretrained(tmp_path / "mlm")
    ModernBertModel(small_config).save_pretrained(tmp_path / "body")
    tagger = AutoModelForTokenClassification.from_pretrained(tmp_path / "mlm", num_labels=9)
    assert isinstance(tagger, ModernBertForTokenClassification)
    assert "classifier.bias, classifier.weight" in log.text
    tagger.save_pretrained(tmp_path / "tagger")
    body = AutoModel.from_pretrained(tmp_path / "tagger")
    assert torch.equal(body.embeddings.tok_embeddings.weight, tagger.get_input_embeddings().weight)
    chooser = AutoModelForMultipleChoice.from_pretrained(tmp_path / "body")
    assert chooser(torch.randint(3, 96, (2, 4, 7))).logits.shape == (2, 4)


def test_an_unknown_architecture_is_named(tmp_path, small_config):
    ModernBertModel(small_config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"model_type": "modernbert"', '"model_type": "bert"'))
    with pytest.raises(ConfigError, match="model_type 'bert'; known are modernbert"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    path.write_text(text.replace('"model_type": "modernbert",', ""))
    assert AutoConfig.from_pretrained(tmp_path).model_type == "modernbert"  # its architectures say so


def test_arguments_of_choices_have_a_dimension_of_choices(small_config):
    model = made(ModernBertForMultipleChoice, small_config)
    ids, mask = (x.view(2, 3, -1) for x in batch())
    width = ids.shape[2]
    wanted = model(ids, mask).logits
    for window in (torch.ones(2, 3, width), torch.ones(2, 3, 1, width, width), torch.ones(6, 1, width, width)):
        assert torch.equal(model(ids, mask, sliding_window_mask=window).logits, wanted)
    positions = torch.arange(width)
    for given in (positions, positions[None], positions.expand(2, 3, -1)):
        assert torch.equal(model(ids, mask, position_ids=given).logits, wanted)
    with pytest.raises(InputError, match=r"position_ids has shape \(2, \d+\); with this input it must be \(2, 3, "):
        model(ids, mask, position_ids=positions.expand(2, -1))


SEQUENCE, TOKENS = ModernBertForSequenceClassification, ModernBertForTokenClassification
ANSWERS, CHOICES = ModernBertForQuestionAnswering, ModernBertForMultipleChoice


@pytest.mark.parametrize(
    ("cls", "changes", "given", "message"),
    [
        (SEQUENCE, {}, {"labels": [0, 2]}, "labels holds 2; it must hold 0 to 1"),
        (SEQUENCE, {}, {"labels": [0]}, r"\(1,\).*takes \(2,\) or \(2, 1\)"),
        (SEQUENCE, {"problem_type": "multi_label_classification"}, {"labels": [0, 1]}, r"takes \(2, 2\)"),
        (SEQUENCE, {"problem_type": "single_label_classification"}, {"labels": [0.0, 1.0]}, "dtype torch.float32"),
        (ModernBertForMaskedLM, {}, {"labels": [[96] * 6] * 2}, "labels holds 96; it must hold 0 to 95, or -100"),
        (TOKENS, {}, {"labels": [0, 1]}, r"labels has shape \(2,\)"),
        (TOKENS, {}, {"labels": [[9] * 6] * 2}, "labels holds 9"),
        (ANSWERS, {}, {"start_positions": [0, 1]}, "end_positions is missing"),
        (ANSWERS, {}, {"start_positions": [0, 1], "end_positions": [0.5, 1]}, "end_positions has .*torch.float32"),
        (CHOICES, {}, {}, r"input_ids has shape \(2, 6\); it must be \(batch, choices, sequence\)"),
        (CHOICES, {}, {"cu_seqlens": [0, 6], "num_choices": 2}, "num_choices is 2"),
        (CHOICES, {}, {"cu_seqlens": [0, 6], "num_choices": (3,)}, r"is \[3\]"),
        (
            CHOICES,
            {},
            {"cu_seqlens": [0, 2, 4, 6], "num_choices": (1, 2), "labels": [1, 1]},
            "labels holds 1 for question 0, which has 1 choices",
        ),
    ],
)
def test_bad_labels_are_one_clear_error(small_config, cls, changes, given, message):
    ids = torch.randint(3, 96, (1 if "cu_seqlens" in given else 2, 6))
    given = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in given.items()}
    with pytest.raises(InputError, match=message):
        cls(small_config.replace(**changes))(ids, **given)
