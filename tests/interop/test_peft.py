"""PEFT's adapters on every class, for each of its task types that has a head."""

import peft
import pytest
import torch

import modernbert
from tests.conftest import model_of
from tests.interop.batches import batch_of

TASKS = {
    "ModernBertModel": "FEATURE_EXTRACTION",
    "ModernBertForMaskedLM": None,
    "ModernBertForSequenceClassification": "SEQ_CLS",
    "ModernBertForTokenClassification": "TOKEN_CLS",
    "ModernBertForQuestionAnswering": "QUESTION_ANS",
    "ModernBertForMultipleChoice": None,
    "ModernBertDecoderModel": "FEATURE_EXTRACTION",
    "ModernBertDecoderForCausalLM": "CAUSAL_LM",
    "ModernBertDecoderForSequenceClassification": "SEQ_CLS",
}


def adapter_of(kind, task):
    """A configuration of PEFT."""
    if kind == "lora":
        return peft.LoraConfig(task_type=task, r=2, target_modules=["Wi", "Wo"], init_lora_weights=False)
    if kind == "ia3":
        return peft.IA3Config(task_type=task, target_modules=["Wi", "Wo"], feedforward_modules=["Wi"])
    if kind == "p-tuning":
        return peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=4, encoder_hidden_size=16)
    return peft.PromptTuningConfig(task_type=task, num_virtual_tokens=4)


# PEFT does not lengthen the labels of tokens by its virtual ones, whosever the model.
PROMPTED = [name for name, task in TASKS.items() if task not in (None, "TOKEN_CLS")]
CASES = [*((name, "lora") for name in TASKS), *((name, "prompt") for name in PROMPTED)]
CASES += [(name, kind) for name in ("ModernBertModel", "ModernBertDecoderForCausalLM") for kind in ("ia3", "p-tuning")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_adapters_train_are_saved_and_load(name, kind, tmp_path):
    batch, base = batch_of(name), str(tmp_path / "base")
    model_of(name, initializer_range=0.2).save_pretrained(base)
    model = getattr(modernbert, name).from_pretrained(base)
    adapted = peft.get_peft_model(model, adapter_of(kind, TASKS[name])).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    output = adapted(**batch)
    (output.loss if "For" in name else output.last_hidden_state.square().mean()).backward()
    trained = {key: parameter.grad for key, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(grad is not None and grad.abs().max() > 0 for grad in trained.values())
    adapted.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(getattr(modernbert, name).from_pretrained(base), tmp_path).eval()
    assert again.peft_config["default"].base_model_name_or_path == base
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        wanted = adapted(**batch)[0]
        assert torch.equal(again(**batch)[0], wanted)
        if "CausalLM" in name:
            assert adapted.generate(**batch, max_new_tokens=3).shape[1] >= 11
        if kind == "lora":
            merged = again.merge_and_unload()
            assert type(merged) is type(model)
            torch.testing.assert_close(merged(**batch)[0], wanted, rtol=0, atol=1e-4)


def test_what_is_not_served_says_what_is():
    model = model_of("ModernBertForMaskedLM")
    with pytest.raises(AttributeError, match=r"has no add_adapter; PEFT trains adapters: peft.get_peft_model"):
        model.add_adapter(peft.LoraConfig())
