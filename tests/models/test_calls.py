"""How models may be called: what is no tensor, ids and vectors of any dtype, hidden states with gradients, forks."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import modernbert
from modernbert.errors import InputError
from modernbert.text.encoding import BatchEncoding
from tests.conftest import model_of, random_decoder
from tests.heads import CLASSES


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_no_tensor_is_refused_in_one_line(name):
    model = model_of(name)
    for given in ([[5, 6]], np.array([[5, 6]])):
        with pytest.raises(
            InputError, match=rf"^input_ids is a {type(given).__name__}; it must be a tensor: .*return_"
        ):
            model(given)
    encoding = BatchEncoding({"input_ids": torch.tensor([[5, 6]])})
    with pytest.raises(InputError, match=r"^input_ids is a BatchEncoding; give what it holds by name: model\(\*\*enc"):
        model(encoding)
    with pytest.raises(InputError, match=r"^attention_mask is a list; it must be a tensor"):
        model(torch.tensor([[5, 6]]), attention_mask=[[1, 1]])
    with pytest.raises(InputError, match=r"^position_ids is a list; it must be a tensor"):
        model(torch.tensor([[5, 6]]), position_ids=[[0, 1]])


@pytest.mark.parametrize("name", [name for name in CLASSES if "For" in name])
def test_labels_that_are_no_tensor_are_refused(name):
    ids = torch.tensor([[[5, 6]]]) if "MultipleChoice" in name else torch.tensor([[5, 6]])
    given = {"start_positions": [1], "end_positions": [1]} if "QuestionAnswering" in name else {"labels": [1]}
    first = next(iter(given))
    with pytest.raises(InputError, match=rf"^{first} is a list; it must be a tensor"):
        model_of(name)(ids, **given)


def test_question_answering_names_its_labels():
    with pytest.raises(
        InputError, match=r"^labels is given; question answering takes start_positions and end_positions"
    ):
        model_of("ModernBertForQuestionAnswering")(torch.tensor([[5, 6]]), labels=torch.tensor([1]))


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("name", ["ModernBertForMaskedLM", "ModernBertDecoderForCausalLM"])
def test_ids_of_any_whole_dtype_give_the_same(name, optimized):
    model = model_of(name)
    model = model.optimize_for_inference() if optimized else model
    ids = torch.randint(3, 96, (2, 7))
    with torch.no_grad():
        expected = model(ids).logits
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
            assert torch.equal(model(ids.to(dtype)).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimized", [False, True])
def test_vectors_of_another_dtype_are_taken_as_the_model_s(optimized, dtype):
    model = model_of("ModernBertForMaskedLM").to(dtype)
    model = model.optimize_for_inference() if optimized else model
    vectors = torch.randn(2, 7, 48)
    with torch.no_grad():
        expected = model(inputs_embeds=vectors.to(dtype)).logits
        for other in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            got = model(inputs_embeds=vectors.to(other)).logits
            assert got.dtype == dtype
            torch.testing.assert_close(got, expected, rtol=0, atol=0.05)
    with pytest.raises(InputError, match=r"inputs_embeds has dtype torch.int64; it must be floating numbers"):
        model(inputs_embeds=vectors.long())


@pytest.mark.parametrize("name", ["ModernBertForMaskedLM", "ModernBertDecoderForCausalLM", "ModernBertModel"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_hidden_state_can_keep_its_gradient(name, padded):
    """It is what moving a state by a little would do to the result."""
    model = model_of(name)
    ids, mask = torch.randint(3, 96, (2, 7)), torch.ones(2, 7).long()
    if padded:
        mask[1, 4:] = 0
    out = model(ids, attention_mask=mask, output_hidden_states=True)
    assert [state.shape for state in out.hidden_states] == [(2, 7, 48)] * 5
    for state in out.hidden_states:
        state.retain_grad()
    last = out.logits if hasattr(out, "logits") else out.last_hidden_state
    (last * mask[..., None]).square().sum().backward()
    for number, state in enumerate(out.hidden_states):
        if name == "ModernBertModel" and number == 4:
            continue  # the last state is the result itself, in another tensor
        assert state.grad is not None
        assert state.grad[mask == 1].abs().max() > 0
        assert not state.grad[mask == 0].any()
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    again = model(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True)
    (gradient,) = torch.autograd.grad(again.hidden_states[1].sum(), embeds)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", ["ModernBertForMaskedLM", "ModernBertDecoderModel"])
def test_attention_weights_can_keep_their_gradients(name):
    """They say which links between tokens matter to a result."""
    model, ids, mask = model_of(name, "eager"), torch.randint(3, 96, (2, 7)), torch.ones(2, 7).long()
    mask[1, 4:] = 0
    with torch.no_grad():
        plain = model(ids, attention_mask=mask, output_attentions=True)
    out = model(ids, attention_mask=mask, output_attentions=True, use_cache=False)
    assert torch.equal(out[0], plain[0])
    for weights, same in zip(out.attentions, plain.attentions, strict=True):
        weights.retain_grad()
        assert torch.equal(weights, same)
    (out[0] * mask[..., None]).square().sum().backward()
    for weights in out.attentions:
        assert weights.grad[0].abs().max() > 0
        assert not weights.grad[1, :, 4:].any()
    packed = model(ids[0], cu_seqlens=torch.tensor([0, 3, 7]), output_attentions=True)
    assert packed.attentions[0].shape == (2, 3, 4, 4)


def test_hidden_states_match_with_and_without_gradients():
    model = model_of("ModernBertForMaskedLM")
    ids, mask = torch.randint(3, 96, (2, 7)), torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    with torch.no_grad():
        plain = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    live = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    fast = model.optimize_for_inference()(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for a, b, c in zip(plain, live, fast, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["ModernBertForMaskedLM", "ModernBertDecoderForCausalLM"])
def test_new_ids_begin_near_the_mean_of_the_old_ones(name):
    model = model_of(name, initializer_range=0.5)
    with torch.no_grad():
        model.decoder.bias.normal_()
    old = model.get_input_embeddings().weight.detach().clone()
    new = model.resize_token_embeddings(120).weight.detach()
    assert torch.equal(new[:96], old)
    rows = new[96:] - old.mean(0)
    spread = old.std(0, unbiased=False).mean() * 1e-9**0.5
    assert 0.7 < rows.std() / spread < 1.4
    assert len({tuple(row) for row in new[96:].tolist()}) == 24
    assert not model.decoder.bias.detach()[96:].any()  # as in transformers
    assert model.decoder.weight is model.get_input_embeddings().weight
    torch.manual_seed(0)
    fresh = model_of(name, initializer_range=0.5).resize_token_embeddings(120, mean_resizing=False).weight[96:]
    assert 0.3 < fresh.std() < 0.6


def test_sizes_and_classes_that_are_none_are_named():
    decoder = random_decoder()
    with pytest.raises(InputError, match=r"^input_ids is a list"):
        decoder([[7]], past_key_values=decoder(torch.tensor([[5, 6]])).past_key_values)
    model = model_of("ModernBertForMaskedLM", pad_token_id=90)
    with pytest.raises(ValueError, match=r"^new_num_tokens is 'x'; it must be a whole number"):
        model.resize_token_embeddings("x")
    with pytest.raises(ValueError, match=r"^pad_to_multiple_of is 1.3; it must be a whole number of at least 1"):
        model.resize_token_embeddings(97, pad_to_multiple_of=1.3)
    with pytest.raises(ValueError, match=r"^new_num_tokens is 90, which leaves pad_token_id 90 outside"):
        model.resize_token_embeddings(90)
    with pytest.raises(TypeError, match=r"AutoModel.from_pretrained\(...\) or AutoModel.from_config"):
        modernbert.AutoModel()
    encoding = BatchEncoding({"input_ids": torch.tensor([[5, 6]])})
    with pytest.raises(InputError, match=r"^input_ids is a BatchEncoding; give what it holds by name"):
        decoder.generate(encoding)


def test_a_file_where_a_folder_is_wanted_is_named(tmp_path):
    (tmp_path / "file.csv").write_text("text")
    with pytest.raises(NotADirectoryError, match=r"file.csv is a file; name another folder$"):
        model_of("ModernBertModel").save_pretrained(tmp_path / "file.csv")
    assert (tmp_path / "file.csv").read_text() == "text"


def test_one_bad_number_does_not_reach_the_new_ids():
    model = model_of("ModernBertForMaskedLM")
    with torch.no_grad():
        model.get_input_embeddings().weight[4, 3] = float("nan")
        model.get_input_embeddings().weight[5, 3] = 1e30
        assert model.resize_token_embeddings(110).weight[96:].isfinite().all()


def test_a_process_that_was_forked_after_loading_computes():
    code = """
import multiprocessing, torch
from tests.conftest import random_decoder
torch.set_num_threads(2)
plain, fast = random_decoder(), random_decoder().optimize_for_inference()
ids = torch.randint(3, 96, (4, 80))
def logits():
    with torch.no_grad():
        return [model(ids, use_cache=False).logits for model in (plain, fast)]
wanted = logits()
def work(queue):
    queue.put([torch.equal(a, b) for a, b in zip(logits(), wanted)])
context = multiprocessing.get_context("fork")
queue = context.Queue()
process = context.Process(target=work, args=(queue,))
process.start()
assert queue.get(timeout=60) == [True, True]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
