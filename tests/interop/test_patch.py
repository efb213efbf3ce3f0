"""Patched models of transformers and objects of sentence-transformers: the numbers, the way back, what is refused."""

import copy
import logging
import pickle
import threading

import numpy as np
import pytest
import torch

import modernbert
from modernbert.errors import InputError, PatchError
from modernbert.interop.patching import PatchedModel
from tests.interop import cells
from tests.interop.environments import ENVIRONMENTS, run_in

transformers = pytest.importorskip("transformers", reason="patches models of transformers")
CLASSES = cells.classes()
HEADS = [name for name in CLASSES if "For" in name]
CELLS = {
    **{name: "transformers" for name in ENVIRONMENTS if name.startswith("transformers")},
    **{name: "sentence_transformers" for name in ENVIRONMENTS if name.startswith("sentence")},
    **{name: name for name in ("pylate", "setfit", "gliner")},
}


@pytest.mark.slow
@pytest.mark.parametrize("environment", CELLS)
def test_every_cell_of_the_version_table(environment):
    line = run_in(environment, f"from tests.interop import cells; print(cells.{CELLS[environment]}())")
    print(line.splitlines()[-1])


@pytest.fixture
def model():
    return cells.model_of("ModernBertForSequenceClassification", num_labels=3)


def link_of(model):
    return model.__dict__["_modernbert"]


def is_laid_out(model):
    return link_of(model).frozen is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CLASSES)
def test_a_patched_model_answers_as_before_and_unpatched_with_the_same_bits(name, dtype):
    model, seen = cells.model_of(name).to(dtype), []
    cls, parameters = type(model), {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    run, given = cells.first_of(name, {}), cells.batch(choices="MultipleChoice" in name)

    def look(patched):
        assert isinstance(patched, cls)
        assert type(patched).__name__ == name
        assert is_laid_out(patched) or dtype != torch.float32
        with torch.no_grad():
            seen.append(patched(**given))

    cells.moved(model, run, 1e-5 if dtype == torch.float32 else 0.05, look=look)
    assert type(model) is cls
    for key, (parameter, numbers) in parameters.items():
        now = model.get_parameter(key)
        assert now is parameter
        assert torch.equal(now, numbers)
        assert now.requires_grad
    with torch.no_grad():
        output = model(**given)
    assert type(output) is type(seen[0])
    assert list(output.keys()) == list(seen[0].keys())
    assert output[0].shape == seen[0][0].shape


@pytest.mark.parametrize("name", HEADS)
def test_training_a_patched_model_gives_the_losses_and_gradients_of_the_unpatched(name):
    from tests.interop.batches import batch_of

    changes = {"classifier_dropout": 0.0}
    plain = cells.model_of(name, **changes)
    patched = modernbert.patch(copy.deepcopy(plain))
    trained = [parameter for parameter in patched.parameters() if parameter.requires_grad]
    assert len(trained) == len(list(plain.parameters()))
    given, losses = batch_of(name, 3), []
    for model in (plain.train(), patched.train()):
        optimizer = torch.optim.SGD(model.parameters() if model is plain else trained, lr=0.1)
        for _ in range(3):
            losses.append(model(**given).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(losses[:3], losses[3:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    run = cells.first_of(name, {})
    for one, other in zip(run(plain.eval()), run(patched.eval()), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-5)
    assert is_laid_out(patched)


@pytest.mark.parametrize(
    "options",
    [
        *({"output_hidden_states": True}, {"output_attentions": True}, {"return_dict": False}),
        *({"position_ids": torch.arange(50)[None]}, {"token_type_ids": torch.zeros(5, 50).long()}),
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_a_call_keep_their_meaning(options):
    plain = cells.model_of("ModernBertModel")
    plain.set_attn_implementation("eager")
    patched, given = modernbert.patch(copy.deepcopy(plain)), cells.batch()
    theirs = options if "token_type_ids" not in options else {}
    with torch.no_grad():
        expected, found = plain(**given, **theirs), patched(**given, **options)
    assert type(expected) is type(found)
    real = given["attention_mask"].bool()
    assert len(expected) == len(found)
    for one, other in zip(flat(expected), flat(found), strict=True):
        weights = one.dim() == 4  # (batch, heads, queries, keys)
        at = real[:, None, :, None].expand_as(one) if weights else real
        torch.testing.assert_close(one[at], other[at], rtol=0, atol=1e-5)


def flat(output):
    parts = output if isinstance(output, tuple) else output.to_tuple()
    return [x for part in parts for x in (part if isinstance(part, tuple) else (part,))]


def test_left_padding_vectors_and_texts_without_tokens(model):
    plain, body = copy.deepcopy(model.model), modernbert.patch(model).model
    given = cells.batch()
    ids, mask = given["input_ids"], given["attention_mask"]
    order = mask.argsort(dim=1, stable=True)
    left = {"input_ids": ids.gather(1, order), "attention_mask": mask.gather(1, order)}
    real, at_left = mask.bool(), left["attention_mask"].bool()
    with torch.no_grad():
        expected = plain(**given)[0]
        torch.testing.assert_close(plain(**left)[0][at_left], body(**left)[0][at_left], rtol=0, atol=1e-5)
        assert torch.equal(body(**left)[0][at_left], body(**given)[0][real])  # the same bits
        vectors = model.get_input_embeddings()(ids)
        assert is_laid_out(model), "the embedding serves without giving its weight"
        found = body(inputs_embeds=vectors, attention_mask=mask)[0]
        torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-5)
        empty = body(input_ids=ids * 0, attention_mask=mask * 0)[0]
        torch.testing.assert_close(plain(ids[:2, :3])[0], body(ids[:2, :3])[0], rtol=0, atol=1e-5)
    assert torch.equal(empty, torch.zeros_like(empty))


@pytest.mark.parametrize(
    "name", ["ModernBertForMaskedLM", "ModernBertForQuestionAnswering", "ModernBertForMultipleChoice"]
)
def test_a_large_batch_is_computed_in_groups_of_rows_to_the_same_bits(name, monkeypatch):
    model = modernbert.patch(cells.model_of(name))
    given = cells.batch(choices="MultipleChoice" in name)
    if "MultipleChoice" in name:
        given = {key: value[0, :4].view(2, 2, -1) for key, value in given.items()}
    with torch.no_grad():
        whole = model(**given)
        monkeypatch.setattr("modernbert.interop.patching.CPU_TOKENS", 40)
        parts = model(**given)
    assert type(whole) is type(parts)
    for one, other in zip(flat(whole), flat(parts), strict=True):
        assert torch.equal(one, other)


WEIGHTS_ARE_ASKED_FOR = {
    "state_dict": lambda model, path: model.state_dict(),
    "save_pretrained": lambda model, path: type(model).plain.from_pretrained(save(model, path)).state_dict(),
    "weight": lambda model, path: {"model.layers.0.mlp.Wi.weight": model.model.layers[0].mlp.Wi.weight.detach()},
    "copy": lambda model, path: copy.deepcopy(model).state_dict(),
    "pickle": lambda model, path: pickle.loads(pickle.dumps(model)).state_dict(),
    "double": lambda model, path: {key: x.float() for key, x in model.double().state_dict().items()},
}


def save(model, path):
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("how", WEIGHTS_ARE_ASKED_FOR)
def test_whoever_asks_for_weights_gets_the_exact_numbers(model, how, tmp_path):
    expected = {key: x.clone() for key, x in model.state_dict().items()}
    found = WEIGHTS_ARE_ASKED_FOR[how](modernbert.patch(model), tmp_path)
    assert found
    for key, numbers in found.items():
        assert torch.equal(numbers, expected[key])
    assert isinstance(model, type(model).plain)
    if how in ("copy", "pickle"):
        assert is_laid_out(model)


def test_copies_are_whole_and_unpatched(model):
    modernbert.patch(model)
    for copied in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model).plain
        assert not hasattr(copied, "_modernbert")
        assert all(type(module).__module__.split(".")[0] != "modernbert" for module in copied.modules())


def test_weights_are_laid_out_again_after_somebody_had_them_and_more_rarely_each_time(model):
    modernbert.patch(model)
    passes = []
    for _ in range(4):
        model.state_dict()
        assert not is_laid_out(model)
        for count in range(1, 20):
            with torch.no_grad():
                model(**cells.batch())
            if is_laid_out(model):
                passes.append(count)
                break
    assert passes == [1, 2, 4, 8]


def test_hooks_on_inner_modules_are_called_by_the_code_of_transformers(model, caplog):
    given, plain, called = cells.batch(), copy.deepcopy(model), []
    modernbert.patch(model)
    handle = model.model.layers[1].register_forward_hook(lambda *args: called.append(1))
    with torch.no_grad():
        assert torch.equal(model(**given)[0], plain(**given)[0])
        assert called == [1]
        handle.remove()
        assert not torch.equal(model(**given)[0], torch.zeros(5, 3))
        assert called == [1]
        model.register_forward_hook(lambda *args: called.append(2))  # on the model itself they are called as well
        model(**given)
    assert called == [1, 2]


def test_a_part_that_is_replaced_is_computed_with(model):
    given = cells.batch()
    modernbert.patch(model)
    model.classifier = torch.nn.Linear(64, 3)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**given)[0], plain(**given)[0], rtol=0, atol=1e-5)
        assert is_laid_out(model)
        model.classifier = torch.nn.Sequential(torch.nn.Linear(64, 3))
        torch.testing.assert_close(model(**given)[0], copy.deepcopy(model)(**given)[0], rtol=0, atol=1e-5)


def test_a_loss_in_evaluation_mode_has_its_gradients(model):
    modernbert.patch(model)
    model(**cells.batch(), labels=torch.tensor([0, 1, 2, 1, 0])).loss.backward()
    assert model.model.layers[0].mlp.Wi.weight.grad is not None
    with torch.no_grad():
        model.model(**cells.batch())  # a part alone lays the weights out again, too
    assert is_laid_out(model)
    vectors = torch.randn(1, 8, 64, requires_grad=True)
    model(inputs_embeds=vectors).logits.sum().backward()
    assert vectors.grad is not None


def test_passes_of_several_threads_while_somebody_asks_for_weights(model):
    given, found = cells.batch(), []
    with torch.no_grad():
        expected = modernbert.patch(model)(**given)[0]

    def work():
        with torch.no_grad():
            found.extend(model(**given)[0] for _ in range(15))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        model.state_dict()
    for thread in threads:
        thread.join()
    assert len(found) == 45
    for answer in found:
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_of_transformers_trains_a_patched_model(model, tmp_path, caplog):
    rows = [{name: value[i % 5] for name, value in cells.batch().items()} | {"labels": i % 2} for i in range(12)]
    options = {"num_train_epochs": 2, "learning_rate": 1e-3, "report_to": [], "save_strategy": "no"}
    found = []
    for trained in (copy.deepcopy(model), modernbert.patch(model)):
        arguments = transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, gradient_checkpointing=True, disable_tqdm=True, **options
        )
        trainer = transformers.Trainer(trained, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        found.append(trainer.evaluate()["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert "own code" not in caplog.text


@pytest.mark.filterwarnings("ignore")
def test_tracing_a_patched_model_is_refused_and_autocast_works(model):
    given = cells.batch()
    with torch.no_grad():
        expected = modernbert.patch(model)(**given)[0]
        with pytest.raises(InputError, match="cannot be traced or exported"):
            torch.jit.trace(model, (given["input_ids"], given["attention_mask"]), strict=False)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(**given)[0].dtype == torch.bfloat16
        torch.testing.assert_close(model(**given)[0], expected, rtol=0, atol=1e-5)


def test_several_objects_may_share_a_model():
    body = cells.model_of("ModernBertModel")
    one, other = torch.nn.Sequential(body), torch.nn.ModuleDict({"a": body, "b": cells.model_of("ModernBertModel")})
    modernbert.patch(one)
    modernbert.patch(modernbert.patch(other))
    assert link_of(body) is link_of(one[0])
    modernbert.unpatch(one)
    with pytest.raises(PatchError, match="holds nothing that is patched"):
        modernbert.unpatch(one)
    assert is_laid_out(other["b"])
    modernbert.unpatch(other)


def quantized(model):
    model.model.layers[0].mlp.Wi = torch.nn.Bilinear(64, 64, 192)


def with_adapter(model):
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["Wi"]), model)


def shared(model):
    model.model.layers[1].mlp.Wi.weight = model.model.layers[0].mlp.Wi.weight


def another_window(model):
    for layer in model.model.layers:
        layer.attention_type = "full_attention"


REFUSED = {
    "is a Bilinear; weights must be in Linear": quantized,
    "adapter of PEFT; merge it first": with_adapter,
    "has hooks; parts of a patched model are not called": lambda m: m.head.register_forward_hook(print),
    "is compiled by torch.compile": lambda m: m.compile(backend="eager"),
    "has weights of several dtypes": lambda m: m.head.half(),
    "configuration that is not served": lambda m: setattr(m.config, "hidden_activation", "celu"),
    "has weights on the meta device": lambda m: m.to("meta"),
    "of other shapes than its configuration": lambda m: setattr(m, "classifier", torch.nn.Linear(64, 9)),
    "computes other states than its configuration": lambda m: [
        setattr(part, "eps", 0.5) for part in m.modules() if isinstance(part, torch.nn.LayerNorm)
    ],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_patched_says_why_and_stays_as_it_is(model, message):
    REFUSED[message](model)
    cls = type(model)
    with pytest.raises(PatchError, match=message):
        modernbert.patch(model)
    assert type(model) is cls
    assert "_modernbert" not in model.__dict__


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (torch.nn.Linear(2, 2), "a Linear holds no ModernBert"),
        ("a text", "a str holds no ModernBert"),
    ],
)
def test_what_holds_no_model_is_refused(thing, message):
    with pytest.raises(PatchError, match=message):
        modernbert.patch(thing)


def test_our_own_models_are_refused_with_what_to_call():
    ours = modernbert.ModernBertModel(modernbert.ModernBertConfig(**cells.CONFIG))
    with pytest.raises(PatchError, match="optimize_for_inference"):
        modernbert.patch(ours)


@pytest.mark.parametrize("how", ["a module with both", "the bare model first", "one after the other"])
def test_several_heads_may_share_a_model(model, how):
    other, given = cells.model_of("ModernBertForTokenClassification"), cells.batch()
    other.model, real = model.model, given["attention_mask"].bool()

    def logits():
        with torch.no_grad():
            return model(**given).logits, other(**given).logits[real]

    before = logits()
    parts = [model, other] if how != "the bare model first" else [model.model, model, other]
    things = parts if how == "one after the other" else [torch.nn.ModuleList(parts)]
    for thing in things:
        modernbert.patch(thing)
    assert isinstance(model.model, PatchedModel)
    for one, expected in zip(logits(), before, strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-5)
    modernbert.unpatch(things[0])
    assert all(torch.equal(one, expected) for one, expected in zip(logits(), before, strict=True))


def test_weights_shared_with_another_module_are_refused(model):
    holder = torch.nn.ModuleDict({"a": model, "b": torch.nn.Linear(64, 200)})
    holder["b"].weight = model.get_input_embeddings().weight
    with pytest.raises(PatchError, match="a Linear outside of the"):
        modernbert.patch(holder)


# The decoder

GENERATE = [
    *({"max_new_tokens": 8}, {"max_new_tokens": 8, "num_beams": 3}, {"max_length": 55, "repetition_penalty": 1.3}),
    *({"max_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2}, {"max_new_tokens": 4, "do_sample": True}),
    {"max_new_tokens": 4, "return_dict_in_generate": True},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", GENERATE, ids=str)
def test_generate_gives_the_tokens_of_the_unpatched_model(options):
    plain = cells.model_of("ModernBertDecoderForCausalLM")
    patched, given = modernbert.patch(copy.deepcopy(plain)), cells.batch()
    order = given["attention_mask"].argsort(dim=1, stable=True)
    given = {key: value.gather(1, order) for key, value in given.items()}  # on the left, as prompts are padded
    found = []
    for model in (plain, patched):
        torch.manual_seed(0)
        found.append(model.generate(**given, **{"do_sample": False} | options))
    ids = [getattr(output, "sequences", output) for output in found]
    assert type(found[0]) is type(found[1])
    assert torch.equal(*ids)
    assert is_laid_out(patched)


CONFIGURED = [  # of the model, of a configuration that is handed over, of the call
    ({"eos_token_id": 174}, {"max_new_tokens": 12}, {}),
    ({"eos_token_id": 174, "pad_token_id": None}, None, {"max_new_tokens": 12}),
    ({"eos_token_id": 174}, None, {"max_new_tokens": 12, "eos_token_id": None}),
    ({"repetition_penalty": 5.0, "max_new_tokens": 9}, {"num_beams": 2}, {}),
    ({"max_length": 11}, {}, {}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("of_model", "handed", "of_call"), CONFIGURED, ids=str)
def test_generate_reads_all_configurations_as_the_unpatched_model(of_model, handed, of_call):
    plain = cells.model_of("ModernBertDecoderForCausalLM")
    patched, ids = modernbert.patch(copy.deepcopy(plain)), cells.batch((7, 7))["input_ids"]
    found = []
    ends = int(plain.generate(ids, max_new_tokens=4, eos_token_id=None)[0, -1])  # so that generation ends there
    of_model = {name: ends if value == 174 else value for name, value in of_model.items()}
    for model in (plain, patched):
        for name, value in of_model.items():
            setattr(model.generation_config, name, value)
        config = None if handed is None else transformers.GenerationConfig(**handed)
        found.append(model.generate(ids, generation_config=config, **of_call))
    assert torch.equal(*found)
    ours = link_of(patched)._generation(patched, (ids,), {"generation_config": config, **of_call})
    assert ours is not None  # by our own code


@pytest.mark.parametrize("rows", ["of another shape", "without tokens"])
@pytest.mark.filterwarnings("ignore")
def test_generate_takes_every_mask_that_the_unpatched_model_takes(rows):
    plain = cells.model_of("ModernBertDecoderForCausalLM")
    patched, ids = modernbert.patch(copy.deepcopy(plain)), cells.batch((7, 7))["input_ids"]
    mask = torch.ones(1, 7).long() if rows == "of another shape" else torch.tensor([[0] * 7, [1] * 7])
    found = [model.generate(ids, attention_mask=mask, max_new_tokens=4) for model in (plain, patched)]
    assert found[0].shape == found[1].shape
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("name", HEADS)
def test_losses_count_the_labels_of_other_batches_where_those_of_transformers_do(name):
    from tests.interop.batches import batch_of

    plain = cells.model_of(name)
    patched, given = modernbert.patch(copy.deepcopy(plain)), batch_of(name, 3)
    one, other = (model(**given, num_items_in_batch=7).loss for model in (plain, patched))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_their_cache_is_gone_on_with():
    plain = cells.model_of("ModernBertDecoderForCausalLM")
    patched, ids = modernbert.patch(copy.deepcopy(plain)), cells.batch((12,))["input_ids"]
    with torch.no_grad():
        expected = plain(ids).logits
        first = patched(ids[:, :8])
        second = patched(ids[:, 8:], past_key_values=first.past_key_values, logits_to_keep=2)
    assert type(first.past_key_values) is type(plain(ids).past_key_values)
    assert second.past_key_values.get_seq_length() == 12
    torch.testing.assert_close(first.logits, expected[:, :8], rtol=0, atol=1e-5)
    torch.testing.assert_close(second.logits, expected[:, -2:], rtol=0, atol=1e-5)


# sentence-transformers


@pytest.fixture(scope="module")
def path():
    pytest.importorskip("sentence_transformers", reason="patches its objects")
    return cells.folder()


@pytest.fixture(scope="module")
def encoder(path):
    import sentence_transformers

    return sentence_transformers.SentenceTransformer(path, device="cpu", prompts={"query": "query: "})


ENCODE = {
    "batch_size": {"batch_size": 3},
    "prompt_name": {"prompt_name": "query"},
    "normalized": {"normalize_embeddings": True, "truncate_dim": 16},
    "tensor": {"convert_to_tensor": True},
    "int8": {"precision": "ubinary"},
    "tokens": {"output_value": "token_embeddings"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", ENCODE.values(), ids=ENCODE)
def test_encode_keeps_what_its_arguments_mean(encoder, options, monkeypatch):
    monkeypatch.setattr("modernbert.interop.encoders.CPU_TOKENS", 100)
    answers = {}

    def run(model):
        answers[type(model)] = model.encode(cells.texts(), show_progress_bar=False, **options)
        return answers[type(model)]

    cells.moved(encoder, run, 1e-5)
    kinds = {(type(answer), len(answer), getattr(answer, "dtype", None)) for answer in answers.values()}
    assert len(answers) == 2
    assert len(kinds) == 1


def test_all_features_of_a_text_keep_their_shapes(encoder):
    def run(model):
        found = model.encode(cells.texts(6), output_value=None, show_progress_bar=False)
        shapes = [features["token_embeddings"].shape for features in found]
        return [*shapes, *(features["sentence_embedding"] for features in found)]

    cells.moved(encoder, run)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("length", [32, 100])
def test_queries_filled_up_outside_of_the_mask_are_computed_packed(length, caplog):
    them = pytest.importorskip("sentence_transformers")
    if not hasattr(them, "MultiVectorEncoder"):
        pytest.skip("sentence-transformers 6 has MultiVectorEncoder")
    encoder = them.MultiVectorEncoder(cells.folder(), device="cpu")
    encoder[0].query_expansion = {"strategy": "fixed", "attend": False, "token": None, "length": length}
    some = [text.rsplit(" ", 40)[0] for text in cells.texts(80)]  # more tokens than are computed in one go

    def look(patched):
        alone = patched.encode_query(some[7])
        assert np.array_equal(alone, patched.encode_query(some)[7])

    with caplog.at_level(logging.WARNING, "modernbert"):
        cells.moved(encoder, lambda model: model.encode_query(some), look=look)
    assert "own code" not in caplog.text


def test_what_is_hidden_before_what_is_seen_is_computed_by_their_code(caplog):
    model, rows = cells.model_of("ModernBertModel"), cells.batch()
    rows["input_ids"][:, 0], rows["attention_mask"][:, 0] = 7, 0
    with torch.no_grad(), caplog.at_level(logging.WARNING, "modernbert"):
        expected = model(**rows).last_hidden_state
        modernbert.patch(model)
        assert torch.equal(model(**rows).last_hidden_state, expected)
    assert "they are not behind those that are seen" in caplog.text


@pytest.mark.parametrize("kind", ["CrossEncoder", "SparseEncoder", "MultiVectorEncoder"])
def test_other_encoders_answer_as_before(path, kind, monkeypatch):
    import sentence_transformers

    monkeypatch.setattr("modernbert.interop.encoders.CPU_TOKENS", 100)
    if not hasattr(sentence_transformers, kind):
        pytest.skip(f"this version has no {kind}")
    some = cells.texts(10)
    encoder = getattr(sentence_transformers, kind)(path, device="cpu", **{"num_labels": 1} if kind[0] == "C" else {})
    if kind == "CrossEncoder":
        cells.moved(encoder, lambda model: model.predict(list(zip(some, some[::-1], strict=True))))
        cells.moved(encoder, lambda model: [[hit["score"] for hit in model.rank(some[0], some)]])
    else:
        cells.moved(encoder, lambda model: model.encode(some), 5e-5)


def test_an_encoder_trains_patched(path):
    import sentence_transformers

    losses = []
    for patched in (False, True):
        encoder = sentence_transformers.SentenceTransformer(path, device="cpu")
        if patched:
            modernbert.patch(encoder)
        encoder.train()
        features = encoder.preprocess(cells.texts(4))
        loss = encoder(features)["sentence_embedding"].square().sum()
        loss.backward()
        losses.append((loss.detach(), encoder[0].auto_model.layers[0].mlp.Wi.weight.grad))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


def test_copies_of_an_encoder_are_unpatched_and_saved_whole(encoder, tmp_path):
    some = cells.texts(4)
    expected = encoder.encode(some)
    modernbert.patch(encoder)
    try:
        for copied in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
            assert type(copied) is type(encoder).plain
            np.testing.assert_array_equal(copied.encode(some), expected)
        encoder.save_pretrained(str(tmp_path))
        np.testing.assert_array_equal(type(encoder).plain(str(tmp_path), device="cpu").encode(some), expected)
    finally:
        modernbert.unpatch(encoder)


@pytest.mark.slow
def test_processes_of_a_pool_encode_unpatched(encoder):
    some = cells.texts(6)
    expected = encoder.encode(some)
    modernbert.patch(encoder)
    try:
        pool = encoder.start_multi_process_pool(["cpu", "cpu"])
        np.testing.assert_allclose(encoder.encode(some, pool=pool), expected, rtol=0, atol=1e-5)
        encoder.stop_multi_process_pool(pool)
    finally:
        modernbert.unpatch(encoder)


# validate


@pytest.mark.parametrize("patched", [False, True])
def test_validate_compares_and_leaves_the_object_as_it_was(encoder, patched):
    if patched:
        modernbert.patch(encoder)
    try:
        found = modernbert.validate(encoder, cells.texts())
        assert type(encoder).__module__.startswith("sentence_transformers")
        assert hasattr(encoder[0].auto_model, "_modernbert") is patched
    finally:
        if patched:
            modernbert.unpatch(encoder)
    assert found.texts == 24
    assert found.tokens > 24
    assert found.least_cosine > 0.99999
    assert 0 < found.largest_difference < 1e-5
    assert found.changed is None
    assert "speedup" in str(found)


def test_validate_counts_labels_that_changed(path):
    model = transformers.ModernBertForSequenceClassification.from_pretrained(path, num_labels=3).train()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    found = modernbert.validate(model, cells.texts(6), tokenizer=tokenizer, batch_size=4)
    assert (found.changed, found.labels) == (0, 6)
    assert model.training
    with pytest.raises(InputError, match="texts is empty"):
        modernbert.validate(model, [])
    with pytest.raises(InputError, match="call is missing"):
        modernbert.validate(torch.nn.Sequential(model), ["a text"])


def test_validate_takes_answers_of_zeros_as_equal_and_states_as_no_labels():
    model = cells.model_of("ModernBertDecoderModel")
    assert modernbert.validate(model, ["a", "b"], lambda thing, texts: np.zeros((len(texts), 3))).least_cosine == 1
    batch = {name: value[:1] for name, value in cells.batch().items()}
    assert modernbert.validate(model, ["a"], tokenizer=lambda texts, **options: batch).changed is None


def test_what_was_patched_is_logged(model, caplog):
    with caplog.at_level(logging.INFO, "modernbert"):
        modernbert.patch(model)
    assert "patched a ModernBertForSequenceClassification" in caplog.text
