"""Attention maps and attributions: the numbers, and pages that stand alone and run."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from modernbert import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer
from modernbert.errors import InputError
from modernbert.pipelines import small_model
from modernbert.tools import attention_of, attribute, draw_attention, draw_attribution
from tests.commands import called

TEXT = "The dog ran across the <road> & looked at “it”."


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(small_model())


@pytest.fixture(scope="module")
def masked_lm():
    return AutoModelForMaskedLM.from_pretrained(small_model(), dtype="float32")


def data_of(page):
    """What a page's script reads."""
    return json.loads(re.search(r"const data = (.*);\n", page)[1])


def test_attention_is_the_models_and_rows_add_up(masked_lm, tokenizer):
    found = attention_of(masked_lm, tokenizer, TEXT)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    expected = masked_lm(ids, output_attentions=True).attentions
    assert found.kinds == masked_lm.config.layer_types
    assert "".join(found.tokens[1:-1]) == TEXT
    for weights, layer in zip(found.weights, expected, strict=True):
        assert torch.equal(weights, layer[0])
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, ids.shape[1]))


def test_the_page_of_attention_holds_every_weight_and_fetches_nothing(tokenizer):
    model = AutoModel.from_pretrained(small_model(), dtype="float32")
    model.prune_heads({1: [0, 2]})
    found = attention_of(model, tokenizer, TEXT)
    page = draw_attention(found, "A <title>")
    assert "A &lt;title&gt;" in page
    assert not re.search(r"(?:src|href)=|https?://|@import", page)
    data = data_of(page)
    n = len(data["tokens"])
    assert data["heads"] == [4, 2, 4, 4, 4, 4]
    assert data["kinds"] == ["global", "local", "local"] * 2
    for text, weights in zip(data["layers"], found.weights, strict=True):
        drawn = np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, n, n) / 255
        np.testing.assert_allclose(drawn**2, weights.numpy(), atol=0.004)


def test_attributions_add_up_to_the_score(masked_lm, tokenizer):
    text = "He put his hand in his [MASK] and took out some money."
    found = attribute(masked_lm, tokenizer, text)
    ids = tokenizer(text, return_tensors="pt").input_ids
    place = ids[0].tolist().index(tokenizer.mask_token_id)
    with torch.no_grad():
        probabilities = masked_lm(ids).logits[0, place].softmax(-1)
    assert found.score == pytest.approx(probabilities.max().item(), abs=1e-6)
    assert found.target == tokenizer.decode([int(probabilities.argmax())])
    assert found.score - found.baseline == pytest.approx(sum(found.scores) + found.error, abs=1e-6)
    assert abs(found.error) <= 0.05 * abs(found.score - found.baseline)
    special = [i for i, token in enumerate(found.tokens) if token in ("[CLS]", "[SEP]", "[MASK]")]
    assert all(found.scores[i] == 0 for i in special)
    other = attribute(masked_lm, tokenizer, text, target="hand")
    assert other.target == " hand"
    mark = attribute(masked_lm, tokenizer, "It was a dog [MASK]", target="!", steps=1)  # one token, without a space
    assert mark.target == "!"
    assert other.score == pytest.approx(probabilities[tokenizer.convert_tokens_to_ids("Ġhand")].item(), abs=1e-6)


def test_what_a_label_rests_on(tokenizer):
    """A classifier made to look for one word alone finds it."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        small_model(), dtype="float32", id2label={0: "other", 1: "money"}
    )
    states = model.model
    with torch.no_grad():
        for layer in states.layers:  # only the residual stream is left: the mean of the tokens themselves
            layer.attn.Wo.weight.zero_()
            layer.mlp.Wo.weight.zero_()
        word = states.final_norm(states.embeddings(torch.tensor(tokenizer(" money").input_ids[1:2]), None))[0]
        model.head.dense.weight.copy_(torch.eye(256))
        model.classifier.weight[1] = 0.1 * word
        model.classifier.weight[0] = 0
        model.classifier.bias.zero_()
    model.config = model.config.replace(classifier_pooling="mean")
    found = attribute(model, tokenizer, "He took some money out of it.", target="money")
    best = max(range(len(found.scores)), key=lambda i: found.scores[i])
    assert found.tokens[best] == " money"
    assert attribute(model, tokenizer, "It rained.", target="other").target == "other"
    page = draw_attribution(found, "Why")
    assert data_of(page)["scores"] == found.scores
    assert not re.search(r"(?:src|href)=|https?://", page)


def test_script_cannot_be_ended_by_a_text(masked_lm, tokenizer):
    text = "</script><b>[MASK]"
    page = draw_attribution(attribute(masked_lm, tokenizer, text, steps=1))
    assert page.count("</script>") == 1
    assert "".join(data_of(page)["tokens"][1:-1]) == text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_a_browser_shows_labels_on_the_large_map_and_words_in_reading_order(masked_lm, tokenizer, tmp_path):
    text = "Once upon a time a lighthouse [MASK] there."

    def opened(page):
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        place = [f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", (tmp_path / "page.html").as_uri()]
        return subprocess.run([*command, *place], capture_output=True, text=True, timeout=60, check=True).stdout

    found = attention_of(masked_lm, tokenizer, text)
    shown = opened(draw_attention(found))
    for start, end in (('<div id="columns"', '<div id="rows"'), ('<div id="rows"', '<canvas id="map"')):
        labels = re.findall("<div[^>]*>([^<]+)</div>", shown.split(start)[1].split(end)[0])
        assert labels == [token.strip() for token in found.tokens]
    shown = opened(draw_attribution(attribute(masked_lm, tokenizer, text, steps=1)))
    words = re.findall("<tr><td>([^<]*)</td>", shown.split('id="rows"')[1])
    assert words == ["Once", "upon", "a", "time", "a", "lighthouse", "there", "."]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "text is empty or only spaces"),
        (None, {}, "text is None"),
        ("word " * 600 + "[MASK]", {}, "a page holds at most 512"),
        ("no mask", {}, r"there is no \[MASK\] in the text"),
        ("[MASK]", {"target": "antidisestablishmentarianism"}, "tokens of this vocabulary"),
        ("[MASK]", {"steps": 0}, "steps is 0"),
    ],
    ids=str,
)
def test_bad_input_is_one_clear_error(masked_lm, tokenizer, text, options, message):
    with pytest.raises(InputError, match=message):
        attribute(masked_lm, tokenizer, text, **options)


def test_models_without_answers_and_long_texts_are_refused(tokenizer):
    model = AutoModel.from_pretrained(small_model(), attn_implementation="sdpa")
    assert len(attention_of(model, tokenizer, "text").weights) == model.config.num_hidden_layers
    with pytest.raises(InputError, match="needs a sequence classifier or a masked LM; this is a ModernBertModel"):
        attribute(model, tokenizer, "text")
    with pytest.raises(InputError, match="a page holds at most 256"):
        attention_of(model, tokenizer, "word " * 300)


@pytest.mark.parametrize("command", ["attention", "attribution"])
def test_a_page_that_is_there_is_replaced_only_when_asked_for(tmp_path, capsys, command):
    page = tmp_path / "page.html"
    page.write_text("mine")
    given = [command, "The [MASK] ran.", "--output", page]
    code, _, err = called(capsys, *given)
    assert code == 2
    assert page.read_text() == "mine"
    assert f"{page} exists already; name another --output" in err
    if command == "attention":
        assert called(capsys, *given, "--overwrite")[0] == 0
        assert page.read_text() != "mine"
