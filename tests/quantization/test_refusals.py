"""What cannot be quantized, and what cannot be done with what was, is said in one line before anything is prepared."""

import shutil

import pytest
import torch

from modernbert import AutoModelForMaskedLM, QuantizationConfig, finetune, quantize
from modernbert.errors import InputError
from modernbert.training.pretraining.prepare import prepare_data


def test_arguments_of_the_wrong_kind(small_model):
    for model, kind in (("folder", "str"), (torch.nn.Linear(3, 3), "Linear")):
        with pytest.raises(InputError, match=f"model is a {kind}; give a model of this package"):
            quantize(model)
    with pytest.raises(InputError, match="tokenizer is a str; give a Tokenizer"):
        quantize(small_model, tokenizer="folder")
    with pytest.raises(InputError, match="texts is a string; give a list of texts"):
        quantize(small_model, texts="The dog ran.")
    with pytest.raises(InputError, match="paths is 'texts'; give a list of paths"):
        prepare_data("texts", "tokenizer", "out")


@pytest.mark.parametrize("task", ["text-classification", "masked-lm", "sentence-embedding"])
def test_a_quantized_checkpoint_is_not_trained(task, heads, tmp_path):
    folder = tmp_path / "int8"
    shutil.copytree(heads / "MaskedLM", folder)
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype="float32")
    (folder / "model.safetensors").unlink()
    quantize(model, QuantizationConfig(min_cosine=0.0, most_kept=1.0)).save_pretrained(folder)
    rows = [{"text": "a dog", "label": name, "anchor": "a", "positive": "b"} for name in ("yes", "no")] * 8
    with pytest.raises(InputError, match=r"int8 is quantized: whole numbers have no gradient. Train the float"):
        finetune(task, rows, output=tmp_path / "run", model=folder)
