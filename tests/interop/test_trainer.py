"""transformers' Trainer and collators with our models, as scripts use them."""

import functools

import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import modernbert
from modernbert.interop import CheckpointCallback
from modernbert.pipelines import small_model
from tests.conftest import model_of
from tests.heads import CLASSES
from tests.interop.batches import batch_of, row_of

HEADS = [name for name in CLASSES if "For" in name]


def trainer_of(model, folder, rows, tokenizer=None, **options):
    defaults = {
        "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **{**defaults, **options})
    callbacks = [CheckpointCallback(tokenizer)]
    return Trainer(model, args, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)


@pytest.mark.parametrize("name", HEADS)
def test_the_trainer_trains_evaluates_saves_and_resumes(name, tmp_path):
    rows, tokenizer = [row_of(name, seed) for seed in range(8)], modernbert.AutoTokenizer.from_pretrained(small_model())
    through = trainer_of(model_of(name), tmp_path, rows, tokenizer)
    before = through.evaluate()["eval_loss"]
    through.train()
    assert through.evaluate()["eval_loss"] < before
    predictions = through.predict(rows).predictions
    assert len(predictions if isinstance(predictions, tuple) else [predictions]) == 1 + ("Question" in name)
    through.save_model()
    resumed = trainer_of(model_of(name), tmp_path, rows, tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    cls, batch = getattr(modernbert, name), batch_of(name)
    with torch.no_grad():
        wanted = through.model.eval()(**batch)[1]
        assert torch.equal(resumed.model.eval()(**batch)[1], wanted)
        for folder in (tmp_path, tmp_path / "checkpoint-4"):
            assert torch.equal(cls.from_pretrained(folder)(**batch)[1], wanted)
            assert len(modernbert.AutoTokenizer.from_pretrained(folder)) == len(tokenizer)
    fresh = model_of(name)
    fresh.load_state_dict(through.model.state_dict())  # what is tied may be left out
    assert torch.equal(fresh(**batch)[1], wanted)


def test_a_causal_model_s_first_labels_are_not_counted(tmp_path):
    name = "ModernBertDecoderForCausalLM"
    model = model_of(name)
    with torch.no_grad():
        wanted = model(**batch_of(name, 4)).loss.item()
    rows = [row_of(name, seed) for seed in range(4)]
    trainer = trainer_of(model, tmp_path, rows, max_steps=1, save_strategy="no", dataloader_drop_last=True)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted, rel=1e-4)


def test_accumulated_steps_weigh_every_label_the_same(tmp_path):
    """The Trainer counts the labels of a whole step, and `compute_loss` hands the count to the model."""
    name = "ModernBertForTokenClassification"
    rows = [row_of(name, seed) for seed in range(4)]
    for row in rows[:3]:
        row["labels"] = torch.where(torch.arange(10) < 8, -100, row["labels"])
    ends = []
    for size in (1, 4):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
        trainer = trainer_of(model_of(name), tmp_path, rows, save_strategy="no", optim="sgd", **options)
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["ModernBertForMaskedLM", "ModernBertDecoderForCausalLM"])
def test_recomputing_activations_changes_no_step(name, tmp_path):
    rows, ends = [row_of(name, seed) for seed in range(4)], []
    for options in ({}, {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}}):
        trainer = trainer_of(model_of(name), tmp_path, rows, save_strategy="no", max_steps=1, **options)
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == bool(options)
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


COLLATORS = {
    "padding": ("ModernBertForSequenceClassification", DataCollatorWithPadding),
    "masking": ("ModernBertForMaskedLM", DataCollatorForLanguageModeling),
    "causal": ("ModernBertDecoderForCausalLM", functools.partial(DataCollatorForLanguageModeling, mlm=False)),
    "labels of tokens": ("ModernBertForTokenClassification", DataCollatorForTokenClassification),
}


@pytest.mark.parametrize("kind", COLLATORS)
def test_collators_of_transformers_make_batches_of_our_encodings(kind):
    name, collator = COLLATORS[kind]
    tokenizer = modernbert.AutoTokenizer.from_pretrained(small_model())
    rows = [dict(tokenizer(text)) for text in ("One two three.", "Four.")]
    if kind == "labels of tokens":
        rows = [{**row, "labels": [1] * len(row["input_ids"])} for row in rows]
    if kind == "padding":
        rows = [{**row, "label": number} for number, row in enumerate(rows)]
    batch = collator(tokenizer)(rows)
    assert model_of(name, vocab_size=len(tokenizer))(**batch).loss.isfinite()


@pytest.mark.parametrize("options", [{"return_flash_attn_kwargs": True}, {"return_seq_idx": True}, {}])
@pytest.mark.parametrize("name", ["ModernBertForMaskedLM", "ModernBertDecoderForCausalLM"])
def test_flattened_texts_are_texts_of_their_own(name, options):
    model, rows = model_of(name), [row_of(name, seed, 5 + 3 * seed) for seed in range(3)]
    plain = [{key: row[key].tolist() for key in ("input_ids", "labels")} for row in rows]
    output = model(**DataCollatorWithFlattening(**options)(plain))
    alone = [model(row["input_ids"][None]).logits for row in rows]
    assert torch.equal(output.logits, torch.cat(alone, dim=1))
    assert output.loss.isfinite()
