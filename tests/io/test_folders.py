"""What a checkpoint's folder is, decided from its settings once for everything that loads or describes it."""

import json
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder

import modernbert
from modernbert import SentenceEncoder, pipeline
from modernbert.auto import load_as_saved
from modernbert.errors import CheckpointError, InputError
from modernbert.io.hub import Source
from modernbert.models.sentence_encoder import Dense
from modernbert.models.sentence_layout import SETTINGS, contents_of
from modernbert.pipelines import small_model
from modernbert.text.tokenizer import Tokenizer
from modernbert.tools.info import checkpoint_info
from tests.commands import called

pytestmark = pytest.mark.filterwarnings("ignore")  # sentence-transformers deprecates its own older names

PAIR = ("Where is my card?", "The card is on its way.")
SMALL = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 3, "initializer_range": 0.3}


def saved(folder, cls, **changes):
    name = "decoder" if "Decoder" in cls else "encoder"
    torch.manual_seed(0)
    config = modernbert.AutoConfig.from_pretrained(small_model(name)).replace(**SMALL, **changes)
    getattr(modernbert, cls)(config).save_pretrained(folder)
    Tokenizer.from_pretrained(small_model(name)).save_pretrained(folder)
    return folder


def edit(folder, file, **changes):
    path = folder / file
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**values, **changes}))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of each kind, as this library and sentence-transformers write them."""
    root = tmp_path_factory.mktemp("folders")
    body = saved(root / "body", "ModernBertModel")
    saved(root / "classifier", "ModernBertForSequenceClassification", num_labels=1)
    saved(root / "causal", "ModernBertDecoderForCausalLM")
    SentenceTransformer(str(body), device="cpu").save_pretrained(str(root / "sentence"))
    cross = CrossEncoder(str(root / "classifier"), device="cpu", activation_fn=torch.nn.Identity())
    cross.save_pretrained(str(root / "cross"))
    CrossEncoder(str(root / "causal"), device="cpu").save_pretrained(str(root / "causal-cross"))
    MultiVectorEncoder(str(body), device="cpu").save_pretrained(str(root / "late"))
    SparseEncoder(str(body), device="cpu").save_pretrained(str(root / "sparse"))
    shutil.copytree(root / "sentence", root / "pylate")
    edit(root / "pylate", SETTINGS, query_prefix="[Q] ", document_prefix="[D] ", query_length=32)
    return root


KINDS = dict.fromkeys(("body", "classifier", "causal"), "model") | {"sentence": "sentence encoder"}
KINDS |= dict.fromkeys(("cross", "causal-cross"), "cross-encoder")
KINDS |= dict.fromkeys(("late", "pylate"), "late-interaction encoder") | {"sparse": "sparse encoder"}


@pytest.mark.parametrize("folder", KINDS)
def test_what_a_folder_is(made, folder):
    assert contents_of(Source(made / folder)).kind == KINDS[folder]


def test_a_cross_encoder_of_sentence_transformers_6_keeps_its_head_everywhere(made, tmp_path, capsys):
    assert (made / "cross" / "modules.json").is_file()
    expected = CrossEncoder(str(made / "cross"), device="cpu").predict([PAIR])
    ranked = pipeline("text-ranking", made / "cross")(query=PAIR[0], documents=[PAIR[1]])
    np.testing.assert_allclose([r["score"] for r in ranked], expected, rtol=0, atol=1e-5)
    assert type(pipeline(model=made / "cross")).__name__ == "CrossEncoderRanking"
    assert type(load_as_saved(made / "cross")).__name__ == "ModernBertForSequenceClassification"
    about = checkpoint_info(str(made / "cross"), [128])
    assert about["model"]["kind"] == "cross-encoder"
    assert about["labels"] == {"0": "LABEL_0"}
    with pytest.raises(CheckpointError, match=r"is a cross-encoder, which scores pairs.*pipeline\('text-ranking'"):
        pipeline("sentence-embedding", made / "cross")
    assert called(capsys, "quantize", made / "cross", "--output", tmp_path / "int8", "--min-cosine", "0")[0] == 0
    ranked = pipeline("text-ranking", tmp_path / "int8")(query=PAIR[0], documents=[PAIR[1]])
    # the activation that the folder names, which is not the usual sigmoid, goes along
    np.testing.assert_allclose([r["score"] for r in ranked], expected, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("late", r"is a late-interaction encoder; load it by MultiVectorEncoder, or use pipeline\('late-interaction'"),
        (
            "pylate",
            r"is a late-interaction encoder; load it by MultiVectorEncoder, or use pipeline\('late-interaction'",
        ),
        ("sparse", r"is a sparse encoder; load it by SparseEncoder, or use pipeline\('sparse-embedding'"),
    ],
)
def test_encoders_of_other_vectors_are_named_where_they_do_not_serve(made, folder, message):
    with pytest.raises(CheckpointError, match=message):
        pipeline("sentence-embedding", made / folder)
    with pytest.raises(CheckpointError, match=message):
        load_as_saved(made / folder)
    assert checkpoint_info(str(made / folder), [8])["model"]["kind"] == KINDS[folder]
    assert modernbert.AutoModel.from_pretrained(made / folder).config.hidden_size == 48


LATE = {
    "attend_to_expansion_tokens": False, "do_query_expansion": True, "skiplist_words": ["."], "document_length": 180,
    "query_expansion": {"strategy": "min", "length": 8}, "similarity_fn_name": "MaxSim", "model_type": "ColBERT",
}  # fmt: skip


@pytest.mark.parametrize("name", LATE)
def test_each_setting_of_late_interaction_makes_a_folder_one(made, tmp_path, name):
    folder = edit(shutil.copytree(made / "sentence", tmp_path / "x"), SETTINGS, **{name: LATE[name]})
    assert contents_of(Source(folder)).kind == "late-interaction encoder"
    with pytest.raises(CheckpointError, match="is a late-interaction encoder"):
        pipeline("sentence-embedding", folder)


def test_a_cross_encoder_of_a_causal_model_is_named_as_what_it_is(made):
    with pytest.raises(CheckpointError, match="is a cross-encoder, with LogitScore, which is not served;"):
        pipeline("text-ranking", made / "causal-cross")
    with pytest.raises(CheckpointError, match="is a cross-encoder"):
        SentenceEncoder.from_pretrained(made / "causal-cross")
    with pytest.raises(CheckpointError, match="is a cross-encoder, which scores pairs of texts"):
        pipeline("sentence-embedding", made / "causal-cross")
    with pytest.raises(
        InputError, match=r"text-ranking needs a classifier with one label, .* or an encoder, .*; .* is a decoder"
    ):
        pipeline("text-ranking", made / "causal")
    with pytest.raises(CheckpointError, match=r"is a decoder \(modernbert-decoder\); vectors of texts are made by enc"):
        SentenceEncoder.from_pretrained(made / "causal")


def test_an_adapter_without_a_base_is_refused_by_name_beside_weights_and_alone(made, tmp_path):
    beside = edit(shutil.copytree(made / "classifier", tmp_path / "beside"), "adapter_config.json", peft_type="LORA")
    (tmp_path / "alone").mkdir()
    alone = edit(tmp_path / "alone", "adapter_config.json", peft_type="LORA")
    (alone / "adapter_model.safetensors").write_bytes(b"")
    layout = edit(shutil.copytree(made / "sentence", tmp_path / "layout"), "adapter_config.json", peft_type="LORA")
    loads = [
        modernbert.AutoModelForSequenceClassification.from_pretrained,
        modernbert.ModernBertForSequenceClassification.from_pretrained,
        SentenceEncoder.from_pretrained,
        load_as_saved,
        lambda folder: pipeline("text-ranking", folder),
        lambda folder: pipeline(None, folder),
        lambda folder: checkpoint_info(str(folder), [8]),
    ]
    for folder in (beside, alone, layout):
        for load in loads:
            with pytest.raises(CheckpointError, match=r"holds an adapter \(adapter_config\.json\).*base, adapter="):
                load(folder)


def test_truncate_dim_of_a_folder_acts_and_is_saved(made, tmp_path):
    folder = edit(shutil.copytree(made / "sentence", tmp_path / "x"), SETTINGS, truncate_dim=16)
    whole = pipeline("sentence-embedding", made / "sentence")
    ours = pipeline("sentence-embedding", folder)
    texts = [*PAIR, "No."]
    assert ours.dimensions == 16
    np.testing.assert_array_equal(ours(texts), whole(texts)[:, :16])
    np.testing.assert_array_equal(ours(texts, truncate_dim=40), whole(texts)[:, :40])  # a caller's word wins
    expected = SentenceTransformer(str(made / "sentence"), device="cpu", truncate_dim=16)
    np.testing.assert_allclose(
        ours(texts, normalize=True), expected.encode(texts, normalize_embeddings=True), rtol=0, atol=1e-5
    )
    ids = ours.tokenizer("No.", return_tensors="pt").input_ids
    encoder = SentenceEncoder.from_pretrained(folder)
    np.testing.assert_allclose(encoder(ids)[0].detach(), ours("No."), rtol=0, atol=1e-5)
    encoder.save_pretrained(tmp_path / "again")
    assert SentenceEncoder.from_pretrained(tmp_path / "again").dimensions == 16
    ranked = pipeline("text-ranking", folder)(query=PAIR[0], documents=[PAIR[1]])
    a, b = whole(PAIR[0])[:16], whole(PAIR[1])[:16]
    assert ranked[0]["score"] == pytest.approx(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)), abs=1e-5)


def test_a_prompt_that_is_null_is_no_text(made, tmp_path):
    folder = edit(shutil.copytree(made / "sentence", tmp_path / "x"), SETTINGS, prompts={"query": None, "q": "ask: "})
    ours = pipeline("sentence-embedding", folder)
    np.testing.assert_array_equal(ours("No.", prompt_name="query"), ours("No."))
    np.testing.assert_array_equal(ours("No.", prompt_name="q"), ours("ask: No."))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"similarity_fn_name": "tanimoto"}, "has similarity_fn_name 'tanimoto'; known are cosine, dot"),
        ({"similarity_fn_name": ["dot"]}, "has similarity_fn_name"),
        ({"truncate_dim": 0}, "has truncate_dim 0; it must be a whole number of at least 1"),
        ({"truncate_dim": "8"}, "has truncate_dim '8'"),
        ({"prompts": ["a"]}, r"has prompts \['a'\]; they must be texts by name"),
        ({"prompts": {"query": 3}}, "has prompts"),
        ({"default_prompt_name": "query"}, "default_prompt_name is 'query'; there are none"),
        ({"default_prompt_name": {}}, "default_prompt_name is {}"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused_by_name(made, tmp_path, settings, message):
    folder = edit(shutil.copytree(made / "sentence", tmp_path / "x"), SETTINGS, **{"prompts": {}, **settings})
    with pytest.raises(ValueError, match=message):
        pipeline("sentence-embedding", folder)


@pytest.mark.parametrize("part", [{"type": None, "path": ""}, {"type": "x", "path": None}, {"path": ""}, None, "x"])
def test_parts_without_a_type_and_a_path_are_refused(made, tmp_path, part):
    folder = shutil.copytree(made / "sentence", tmp_path / "x")
    (folder / "modules.json").write_text(json.dumps([part]))
    with pytest.raises(CheckpointError, match="is no list of parts with a type and a path"):
        pipeline("sentence-embedding", folder)


def test_what_generation_config_may_ask_for_is_bounded(made, tmp_path):
    folder = edit(
        shutil.copytree(made / "causal", tmp_path / "x"), "generation_config.json", num_return_sequences=10**9
    )
    with pytest.raises(
        InputError, match=r"num_return_sequences is 1000000000 in the generation_config; .* 1024 at most"
    ):
        pipeline("text-generation", folder)("a")
    answers = pipeline("text-generation", folder)("a", num_return_sequences=2, max_new_tokens=1, seed=0)
    assert len(answers) == 2
    edit(folder, "generation_config.json", num_return_sequences=1, pad_token_id=-1, eos_token_id=-1)
    assert pipeline("text-generation", folder)("a", max_new_tokens=2, seed=0)


@pytest.mark.parametrize(("kind", "task"), [("causal", "text-generation"), ("body", "sentence-embedding")])
def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_one_error(made, kind, task):
    pipe = pipeline(task, made / kind)
    pipe.tokenizer.add_tokens([f"<{i}>" for i in range(len(pipe.tokenizer), 9000)])
    with pytest.raises(InputError, match=r"the tokenizer gives the id 8999, and the model has ids 0 to \d+; take"):
        pipe("a <8999>")


def test_info_shows_no_control_characters(made, tmp_path, capsys):
    folder = shutil.copytree(made / "classifier", tmp_path / "x")
    edit(folder, "config.json", id2label={"0": "\x1b[31mred\x07"}, label2id=None, architectures=["\x1b[1mX", None, 5])
    shown = called(capsys, "info", folder)[1]
    assert r"\x1b[31mred\x07" in shown
    assert r"\x1b[1mX" in shown
    assert "\x1b" not in shown
    assert "None" not in shown


def test_dense_parts_that_do_not_fit_are_named(made, tmp_path):
    encoder = SentenceEncoder.from_pretrained(made / "sentence")
    encoder.after_pooling.append(Dense(32, 8))
    encoder.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has a dense part for 32 dimensions after parts that give 48"):
        SentenceEncoder.from_pretrained(tmp_path)
    edit(tmp_path, "2_Dense/config.json", in_features=10**12)
    with pytest.raises(CheckpointError, match=r"2_Dense holds .* its configuration wants"):
        SentenceEncoder.from_pretrained(tmp_path)
    for value in ("32", None, True, 0):
        edit(tmp_path, "2_Dense/config.json", in_features=value)
        with pytest.raises(CheckpointError, match="2_Dense has in_features"):
            SentenceEncoder.from_pretrained(tmp_path)


OURS = {"quant_method": "modernbert", "format": 1, "scheme": "int8"}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (5, "has quantization_config 5"),
        ({"quant_method": "gptq"}, "was quantized by 'gptq'"),
        ({"quant_method": ["modernbert"]}, r"was quantized by \['modernbert'\]"),
        ({**OURS, "scheme": ["int8"]}, r"scheme \['int8'\]"),
        ({**OURS, "finer": ["a"]}, "has finer"),
        ({**OURS, "measured": {"cosine_min": "x"}}, "has measured"),
    ],
    ids=str,
)
def test_settings_of_quantized_weights_that_make_no_sense_are_refused(made, tmp_path, said, message):
    folder = edit(shutil.copytree(made / "body", tmp_path / "x"), "config.json", quantization_config=said)
    for load in (load_as_saved, lambda folder: checkpoint_info(str(folder), [8])):
        with pytest.raises(CheckpointError, match=message):
            load(folder)
