"""Defaults of generation: attributes, files, and which of several layers counts."""

import copy
import json
import pickle

import pytest
import torch
import transformers

from modernbert import ModernBertDecoderForCausalLM
from modernbert.decoding.config import GenerationConfig
from modernbert.errors import InputError


@pytest.mark.parametrize("make", [GenerationConfig, transformers.GenerationConfig])
def test_attributes_and_files_are_those_of_transformers(make, tmp_path):
    config = make(max_new_tokens=7, do_sample=True, temperature=0.5, eos_token_id=[2, 5], another=3)
    assert (config.max_new_tokens, config.temperature, config.top_p, config.another) == (7, 0.5, None, 3)
    config.top_p = 0.9
    assert config.update(top_k=4, nonsense=1) == {"nonsense": 1}
    assert config.top_k == 4
    with pytest.raises(AttributeError, match="nonsense"):
        _ = config.nonsense
    assert config == copy.deepcopy(config) == pickle.loads(pickle.dumps(config))
    assert config != make(max_new_tokens=7)
    config.save_pretrained(tmp_path)
    for kind in (GenerationConfig, transformers.GenerationConfig):
        read, unused = kind.from_pretrained(tmp_path, top_k=9, return_unused_kwargs=True)
        assert (read.top_k, read.top_p, read.eos_token_id, unused) == (9, 0.9, [2, 5], {})
    assert {**config.to_dict(), "x": 1}["bad_words_ids"] is None
    assert json.loads(config.to_json_string())["top_p"] == config.to_diff_dict()["top_p"] == 0.9
    assert make.from_dict({"top_k": 3}).top_k == 3
    config.validate()
    with pytest.raises(ValueError, match=r"max_new_tokens|temperature"):
        make(max_new_tokens=0, do_sample=True, temperature=-1.0).validate(strict=True)


def test_a_model_s_defaults(small_decoder, tmp_path, log):
    model = copy.deepcopy(small_decoder)
    assert isinstance(model.generation_config, GenerationConfig)
    assert model.generation_config.eos_token_id == model.config.eos_token_id
    assert model.can_generate()
    made = GenerationConfig.from_model_config(model.config)
    assert (made.pad_token_id, made._from_model_config) == (model.config.pad_token_id, True)
    model.generation_config.max_new_tokens = 3
    model.generation_config.eos_token_id = []
    ids = torch.tensor([[5, 6, 7]])
    assert model.generate(ids).shape == (1, 6)
    assert model.generate(ids, max_new_tokens=2).shape == (1, 5)
    assert model.generate(ids, max_length=7).shape == (1, 7)
    theirs = transformers.GenerationConfig(max_new_tokens=4, return_dict_in_generate=True, output_scores=True)
    out = model.generate(ids, theirs)
    assert out.sequences.shape == (1, 7)
    assert len(out.scores) == 4
    assert model.generate(ids, generation_config=GenerationConfig(max_length=8), max_new_tokens=1).shape == (1, 4)
    assert model.generate(ids, generation_config={"max_length": 8}).shape == (1, 8)
    with pytest.raises(InputError, match=r"penalty_alpha is 0.6; contrastive search"):
        model.generate(ids, generation_config=GenerationConfig.from_dict({"penalty_alpha": 0.6}))
    with pytest.raises(InputError, match="generation_config is an int; give a GenerationConfig"):
        model.generate(ids, generation_config=5)
    model.generation_config = theirs
    model.generation_config.penalty_alpha = 0.6
    model.save_pretrained(tmp_path)
    again = ModernBertDecoderForCausalLM.from_pretrained(tmp_path)
    assert again.generation_config == model.generation_config
    assert "names options that are not served: penalty_alpha" in log.text
    assert again.generate(ids).sequences.shape[1] <= 7
    again.generation_config = None
    assert again.generate(ids, max_new_tokens=2, eos_token_id=[]).shape == (1, 5)
