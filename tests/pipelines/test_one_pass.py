"""Several tasks from one pass: the bits of each pipeline, one encoder in memory, one pass over each row."""

import contextlib
import copy
import pickle

import numpy as np
import pytest
import torch

import modernbert
from modernbert import MultiVectorEncoder, MultiVectorSettings, OnePass, SparseEncoder, Tokenizer, pipeline
from modernbert.errors import InputError
from modernbert.models.sentence_encoder import SentenceEncoder
from modernbert.models.sentence_layout import EmbeddingSettings
from modernbert.models.sharing import difference
from modernbert.pipelines import small_model
from modernbert.pipelines.sparse_embedding import SparseEmbeddingPipeline
from modernbert.retrieval.multi_vector import Expansion

TASKS = {
    "vector": "sentence-embedding",
    "words": "sparse-embedding",
    "tokens": "late-interaction",
    "topic": "text-classification",
    "tags": "token-classification",
    "mask": "fill-mask",
}
TEXTS = [
    "The capital of France is [MASK].",
    "A [MASK] cat sat on the mat while rain fell. " * 4,
    "[MASK]",
    "Rivers flow to the [MASK] and the moon is bright.",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each task, all over one small encoder of random weights."""
    root, tokenizer = tmp_path_factory.mktemp("shared"), Tokenizer.from_pretrained(small_model())
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = modernbert.AutoConfig.from_pretrained(small_model()).replace(**sizes, initializer_range=0.3)
    torch.manual_seed(0)
    masked = modernbert.ModernBertForMaskedLM(config).eval()
    settings = MultiVectorSettings(skipped_words=(".",), prompts={"query": "q: ", "document": ""})
    made = {
        "vector": SentenceEncoder(masked.model, EmbeddingSettings(prompts={"query": "search: "})),
        "words": SparseEncoder(masked),
        "tokens": MultiVectorEncoder(masked.model, settings),
        "mask": masked,
    }
    made["vector"].model.save_pretrained(root / "bare")
    tokenizer.save_pretrained(root / "bare")
    for name, head in (("topic", "SequenceClassification"), ("tags", "TokenClassification")):
        cls = getattr(modernbert, f"ModernBertFor{head}")
        made[name] = cls.from_pretrained(root / "bare", num_labels=3)
        torch.nn.init.normal_(made[name].classifier.weight)
    for name, model in made.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


@contextlib.contextmanager
def passes(one):
    """The lengths of the texts in each pass that computes something."""
    found, encode = [], type(one.model).encode

    def spy(self, inputs, *args, **kwargs):
        if inputs.states_TM is None or kwargs.get("backend") is not None:
            found.append(sorted(inputs.packing.lengths))
        return encode(self, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(one.model), "encode", spy)
        yield found


def from_folders(folders, **options):
    return OnePass({name: (task, folders / name) for name, task in TASKS.items()}, **options)


@pytest.fixture(scope="module")
def one(folders):
    return from_folders(folders)


@pytest.fixture(scope="module")
def alone(folders):
    return {name: pipeline(task, folders / name) for name, task in TASKS.items()}


def plain(folders, dtype):
    """Pipelines of models that are not optimized for inference."""
    made = {}
    for name, task in TASKS.items():
        made[name] = pipeline(task, folders / name, dtype=dtype)
        made[name].model.thaw()
    return made


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "plain"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_answer_has_the_bits_of_its_own_pipeline(folders, dtype, frozen):
    if frozen:
        own, one = (
            {n: pipeline(t, folders / n, dtype=dtype) for n, t in TASKS.items()},
            from_folders(folders, dtype=dtype),
        )
    else:
        own, one = plain(folders, dtype), OnePass(plain(folders, dtype))
    assert (one.model.runner is not None) == frozen
    assert one.dtype == getattr(torch, dtype)
    wanted = {name: serve(TEXTS) for name, serve in own.items()}
    for sizes in ({}, {"batch_tokens": 20}):
        assert equal(one(TEXTS, **sizes), wanted)
    for number, answers in enumerate(one(iter(TEXTS))):
        assert equal(answers, {name: wanted[name][number] for name in TASKS})
    assert equal(one(TEXTS[1]), {name: wanted[name][1] for name in TASKS})
    # A pipeline of the shared encoder serves by itself as before.
    assert all(equal(one[name](TEXTS), wanted[name]) for name in TASKS)


def test_a_text_is_read_once_by_one_encoder_in_memory(one):
    lengths = sorted(len(ids) for ids in one.tokenizer(TEXTS).input_ids)
    with passes(one) as found:
        one(TEXTS)
    assert found == [lengths]
    bodies = [getattr(serve.model, "model", None) for serve in one.pipelines.values()]
    bodies = [getattr(body, "model", body) for body in bodies]
    assert all(body is one.model for body in bodies)
    embedding = one.model.embeddings.tok_embeddings
    for name in ("words", "mask"):
        output = one[name].model.model.decoder if name == "words" else one[name].model.decoder
        assert dict(output.named_parameters())["weight"] is dict(embedding.named_parameters())["weight"]


def test_rows_of_other_prompts_and_lengths_are_read_beside_the_others(one, alone):
    text, options = TEXTS[3], {"vector": {"prompt_name": "query"}, "topic": {"truncation": True, "max_length": 5}}
    with passes(one) as found:
        got = one([text], answers=["vector", "words", "topic"], options=options)
    lengths = [len(one.tokenizer(part).input_ids) for part in (text, "search: " + text)]
    assert found == [sorted([*lengths, 5])]
    for name in got:
        assert equal(got[name], alone[name]([text], **options.get(name, {})))


def test_a_long_text_is_read_whole_or_in_windows_as_each_task_does(one, alone):
    long = "Anna lives in Paris. " * 150
    options = {"topic": {"truncation": True}, "vector": {"truncation": True}}
    with passes(one) as found:
        got = one([long, "Rain."], answers=["vector", "tags", "topic"], options=options)
    assert len(found) == 1
    # The first window of the tags is another row than the cut text: it ends with other tokens, or is the same.
    windows = alone["tags"].prepare([long], alone["tags"].resolve(alone["tags"].given({})))[0]
    assert len(windows) > 1
    assert len(found[0]) <= len(windows) + 2
    for name in got:
        assert equal(got[name], alone[name]([long, "Rain."], **options.get(name, {})))


def test_queries_that_have_a_pass_of_their_own_keep_their_bits(folders, tmp_path):
    body = modernbert.ModernBertModel.from_pretrained(folders / "bare", dtype="float32")
    settings = MultiVectorSettings(expansion=Expansion(24), prompts={"query": "", "document": ""})
    torch.manual_seed(1)
    tokenizer = Tokenizer.from_pretrained(small_model())
    late = pipeline("late-interaction", MultiVectorEncoder(body, settings).eval(), tokenizer)
    masked = modernbert.ModernBertForMaskedLM.from_pretrained(folders / "mask", dtype="float32")
    weights = torch.rand(masked.config.vocab_size, generator=torch.Generator().manual_seed(0))
    words = pipeline("sparse-embedding", SparseEncoder(masked, static_V=weights).eval(), tokenizer)
    vector = pipeline("sentence-embedding", body, tokenizer)
    options, texts = {"tokens": {"is_query": True}, "words": {"is_query": True}}, TEXTS[2:]
    wanted = {"vector": vector(texts), "tokens": late(texts, is_query=True), "words": words(texts, is_query=True)}
    one = OnePass({"vector": vector, "tokens": late, "words": words})
    with passes(one) as found:
        assert equal(one(texts, options=options), wanted)
    own = sorted(len(ids) for ids in tokenizer(texts).input_ids)
    assert found == [own, [24, 24]]  # queries by static weights have none


def test_tasks_of_pairs_and_spans_take_inputs_of_their_own(folders, tmp_path):
    tokenizer = Tokenizer.from_pretrained(small_model())
    body = {"pretrained_model_name_or_path": folders / "bare", "dtype": "float32"}
    answer = modernbert.ModernBertForQuestionAnswering.from_pretrained(**body)
    ranker = modernbert.ModernBertForSequenceClassification.from_pretrained(**body, num_labels=1)
    made = {
        "answer": pipeline("question-answering", answer, tokenizer),
        "rank": pipeline("text-ranking", ranker, tokenizer),
        "vector": pipeline("sentence-embedding", modernbert.ModernBertModel.from_pretrained(**body), tokenizer),
        "states": pipeline("feature-extraction", modernbert.ModernBertModel.from_pretrained(**body), tokenizer),
    }
    item = {
        "answer": {"question": "Who lives here?", "context": "Anna lives here. " * 20},
        "rank": {"query": "a cat", "documents": ["A cat sat.", "Rain fell.", "A cat sat."]},
        "vector": {"text": "A cat sat. Rain fell.", "spans": [[0, 10], [11, 21]]},
        "states": "A cat sat. Rain fell.",
    }
    wanted = {name: serve([item[name]]) for name, serve in made.items()}
    one = OnePass(made)
    with passes(one) as found:
        assert equal(one([item]), wanted)
    assert len(found) == 1
    assert one["states"].model is one.model
    with pytest.raises(InputError, match="an input is a dict and lacks 'rank'; give a text, or a dict with an input"):
        one({"answer": item["answer"]})
    with pytest.raises(InputError, match="has 'other'"):
        one({**item, "other": "x"})
    with pytest.raises(InputError, match=r"^answer: an input is a str; question-answering takes a dict with"):
        one("a text alone")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.layers[1].mlp.Wi.weight.data.mul_(1.0001), r"layers\.1\.mlp\.Wi\.weight holds other numbers"),
        (lambda m: m.embeddings.tok_embeddings.weight.data[7].zero_(), "embeddings.tok_embeddings.weight holds other"),
        (lambda m: m.final_norm.weight.data[:1].add_(1), "final_norm.weight holds other numbers"),
        (lambda m: m.to(torch.bfloat16), "weights: float32 and bfloat16"),
        (lambda m: m.set_attn_implementation("eager"), "attn_implementation: auto and eager"),
        (lambda m: m.prune_heads({0: [1]}), r"pruned_heads is \{\} and \{0: \[1\]\}"),
    ],
    ids=["a layer", "the embedding", "the last norm", "the dtype", "the attention", "the architecture"],
)
def test_another_encoder_is_refused_with_how_it_differs(folders, alone, change, said):
    other = modernbert.ModernBertModel.from_pretrained(folders / "bare", dtype="float32")
    change(other)
    tokenizer = Tokenizer.from_pretrained(small_model())
    with pytest.raises(InputError, match=f"^mask and vector have different encoders: {said}") as error:
        OnePass({"mask": folders / "mask", "vector": pipeline("sentence-embedding", other, tokenizer)})
    assert "\n" not in str(error.value)


def test_pipelines_before_the_one_that_is_refused_work_on(folders, alone):
    made = {name: pipeline(TASKS[name], folders / name) for name in ("mask", "topic")}
    other = pipeline("sentence-embedding", folders / "bare")
    other.model.thaw()
    other.model.model.layers[0].attn.Wo.weight.data.add_(1)
    with pytest.raises(InputError, match="mask and other have different encoders"):
        OnePass({**made, "other": other})
    assert all(equal(serve(TEXTS), alone[name](TEXTS)) for name, serve in made.items())


def test_a_pipeline_that_left_for_other_models_is_named(folders):
    first = OnePass({name: folders / name for name in ("vector", "topic")})
    OnePass({"tags": folders / "tags", "topic": first["topic"]})
    with pytest.raises(InputError, match="the model of 'topic' has another encoder than when it was put together"):
        first(TEXTS)
    assert equal(first(TEXTS, answers=["vector"]), {"vector": first["vector"](TEXTS)})


def test_what_no_pass_serves_is_refused(folders):
    with pytest.raises(InputError, match=r"^story is a ModernBertDecoderForCausalLM; only encoders share a pass"):
        OnePass({"mask": folders / "mask", "story": ("text-generation", small_model("decoder"))})
    for given, said in (
        ({}, "there is no model"), (5, "models is an int"), ({1: folders / "mask"}, "an answer is called 1"),
        ([folders / "mask", folders / "mask"], "two models are called 'fill-mask'"),
        ({"a": ("fill-mask", pipeline("fill-mask"))}, "a names a task beside a pipeline"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            OnePass(given)


def test_options_of_each_answer_and_which_answers(one, alone):
    options = {"words": {"top_k": 4, "form": "tokens"}, "topic": {"top_k": None}}
    got = one(TEXTS, answers=["topic", "words"], options=options)
    assert list(got) == ["topic", "words"]
    assert all(equal(got[name], alone[name](TEXTS, **options[name])) for name in got)
    for call, said in (
        ({"answers": ["nothing"]}, "there is no answer 'nothing'; there are vector, words, tokens"),
        ({"answers": []}, "answers is empty"),
        ({"options": {"nothing": {}}}, "there is no answer 'nothing'"),
        ({"options": {"words": {"top": 3}}}, "^words: sparse-embedding has no option top"),
        ({"options": {"words": 3}}, "options has 3 for 'words'"),
        ({"options": {"words": {"top_k": 0}}}, "^words: top_k is 0; it must be a whole number of at least 1"),
        ({"answers": ["topic"], "options": {"words": {}}}, "options has 'words', which is not among the answers topic"),
        ({"best": 1}, "one-pass has no option best"),
    ):
        with pytest.raises(InputError, match=said):
            one(TEXTS, **call)


def test_an_input_that_cannot_be_answered_is_an_error_in_its_place(one, alone):
    texts = [TEXTS[0], "", TEXTS[3]]
    got = one(texts, on_error="return", answers=["topic", "vector"])
    for name, answers in got.items():
        assert isinstance(answers[1], InputError)
        assert str(answers[1]) == "topic: a text is empty or only spaces; there is nothing to answer"
        wanted = alone[name]([texts[0], texts[2]])
        assert equal([answers[0], answers[2]], list(wanted))
    with pytest.raises(InputError, match=r"^mask: there is no"):
        one("no mask here")


def test_copies_share_an_encoder_of_their_own(folders):
    one = OnePass({name: folders / name for name in ("vector", "topic", "tokens")}, answers=["topic", "vector"])
    wanted = one(TEXTS)
    for other in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert other.model is not one.model
        assert other["topic"].model.model is other["vector"].model.model is other.model
        assert other.model.runner is not None
        assert equal(other(TEXTS), wanted)
        assert list(wanted) == ["topic", "vector"]


def test_what_thaws_one_model_thaws_all_and_saving_thaws_none(folders, tmp_path):
    one = from_folders(folders)
    wanted = one(TEXTS)
    for name in ("topic", "mask", "vector"):
        one[name].save_pretrained(tmp_path / name)
        assert (tmp_path / name / "model.safetensors").read_bytes() == (
            folders / name / "model.safetensors"
        ).read_bytes()
    assert one["topic"].model.optimize_for_inference() is one["topic"].model  # is frozen already
    assert one.model.runner is not None
    assert equal(one(TEXTS), wanted)
    one["tags"].model.train()
    assert one.model.runner is None
    assert not any(hasattr(serve.model, "_frozen") and serve.model._frozen for serve in one.pipelines.values())
    with pytest.raises(InputError, match=r"several models are no checkpoint; save one: answers\['vector'\]"):
        one.save_pretrained(tmp_path / "all")


def test_quantized_encoders_are_shared_where_they_were_rounded_alike(folders, tmp_path):
    how = modernbert.QuantizationConfig(scheme="int8-weight-only", min_cosine=0.1, tokens=256)
    vector = pipeline("sentence-embedding", folders / "vector", quantization_config=how)
    vector.save_pretrained(tmp_path / "vector")
    torch.manual_seed(0)
    body = modernbert.ModernBertModel.from_pretrained(tmp_path / "vector")
    MultiVectorEncoder(body).save_pretrained(tmp_path / "tokens")
    vector.tokenizer.save_pretrained(tmp_path / "tokens")
    places = {name: tmp_path / name for name in ("vector", "tokens")}
    wanted = {name: pipeline(None, place)(TEXTS) for name, place in places.items()}
    one = OnePass(places)
    assert one.model.is_quantized
    assert one["tokens"].model.model is one["vector"].model.model
    assert equal(one(TEXTS), wanted)
    with pytest.raises(
        InputError, match="topic and vector have different encoders: weights: float32 and int8-weight-on"
    ):
        OnePass({"topic": folders / "topic", "vector": places["vector"]})


def test_encoders_are_compared_without_thawing_them(folders):
    frozen = [pipeline("sentence-embedding", folders / name).model.model for name in ("vector", "bare")]
    assert difference(*frozen) is None
    assert all(body.runner is not None for body in frozen)
    assert difference(frozen[0], modernbert.ModernBertModel.from_pretrained(folders / "mask", dtype="float32")) is None


def test_a_tokenizer_in_the_first_part_of_a_layout_is_found(folders, tmp_path):
    import json
    import shutil

    for name in ("vector", "words", "tokens"):
        shutil.copytree(folders / name, tmp_path / name)
        inner = tmp_path / name / "0_Transformer"
        inner.mkdir()
        for file in (tmp_path / name).glob("*"):
            if file.name in ("config.json", "model.safetensors") or file.name.startswith(
                ("tokenizer", "sentence_bert")
            ):
                file.rename(inner / file.name)
        modules = json.loads((tmp_path / name / "modules.json").read_text())
        modules[0]["path"] = inner.name
        (tmp_path / name / "modules.json").write_text(json.dumps(modules))
    wanted = OnePass({name: folders / name for name in ("vector", "words", "tokens")})(TEXTS)
    assert equal(OnePass({name: tmp_path / name for name in wanted})(TEXTS), wanted)
    tokenizer = tmp_path / "words"
    alone = pipeline("sparse-embedding", tmp_path / "words", tokenizer=tokenizer)
    assert isinstance(alone, SparseEmbeddingPipeline)
    assert equal(alone(TEXTS), wanted["words"])
