"""An index holds what the files hold, the same vectors whatever happened on the way, and finds what is asked for."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from modernbert import ModernBertForSequenceClassification, ModernBertModel, SentenceEncoder, Tokenizer, pipeline
from modernbert.errors import InputError
from modernbert.indexing import build_index, index, open_index
from modernbert.models.sentence_layout import EmbeddingSettings
from modernbert.pipelines import small_model
from tests.commands import called

pytest.importorskip("lancedb", reason="the extra `search` is not installed")
pytest.importorskip("sentencex", reason="the extra `search` is not installed")
SENTENCES = [f"The {animal} number {i} lives near the river." for i in range(30) for animal in ("otter", "heron")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a sentence encoder of two layers with random weights, prompts, and the small model's tokenizer."""
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("encoder"), Tokenizer.from_pretrained(small_model())
    config = ModernBertModel.from_pretrained(small_model()).config.replace(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, layer_types=None
    )
    settings = EmbeddingSettings(prompts={"query": "query: ", "document": "text: "}, max_length=128)
    SentenceEncoder(ModernBertModel(config.replace(initializer_range=0.3)), settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "inner").mkdir(parents=True)
    (folder / "long.txt").write_text(" ".join(SENTENCES), encoding="utf-8")
    (folder / "inner" / "short.md").write_text("# Rent\n\nThe rent is due on Monday.\n", encoding="utf-8")
    (folder / "page.html").write_text("<p>Herons eat <b>fish</b>.</p>", encoding="utf-8")
    rows = [{"text": f"{s} It's row {i}.", "year": 2000 + i, "id": f"x'{i}"} for i, s in enumerate(SENTENCES[:20])]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / ".hidden.txt").write_text("secret", encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\0")
    return folder


@pytest.fixture
def made(corpus, model, tmp_path):
    report = build_index(corpus, tmp_path / "ix", model, passage_tokens=40)
    assert (report.added, report.failed) == (4, {})
    return open_index(tmp_path / "ix")


def content_of(folder):
    """Every passage with its place, its text and the bits of its vector."""
    table = open_index(folder).store.passages.to_arrow().to_pylist()
    out = {row.pop("id"): (np.array(row.pop("vector"), np.float32).tobytes(), row) for row in table}
    assert len(out) == len(table), "a passage is there twice"
    return out


def test_vectors_are_those_of_late_chunking(made, model, corpus):
    encoder, text = pipeline("sentence-embedding", model), (corpus / "inner" / "short.md").read_text()
    (row,) = [row for _, row in content_of(made.folder).values() if row["path"].endswith("short.md")]
    assert row["text"] == text[row["start"] : row["end"]] == text.strip()
    wanted = encoder({"text": text.strip(), "spans": [(0, row["end"])]}, prompt_name="document")[0]
    (result,) = made.search("x", by="vectors", where="path LIKE '%short.md'")
    query = encoder("x", prompt_name="query")
    similarity = wanted @ query / np.linalg.norm(wanted) / np.linalg.norm(query)
    assert result.score == pytest.approx(float(similarity), abs=1e-6)
    places = [
        (row["start"], row["text"]) for _, row in content_of(made.folder).values() if row["path"].endswith("long.txt")
    ]
    assert len(places) > 10
    assert " ".join(text for _, text in sorted(places)) == (corpus / "long.txt").read_text()


def test_passages_that_are_read_alone_have_the_vectors_of_their_texts(corpus, model, tmp_path):
    build_index(corpus, tmp_path / "ix", model, passage_tokens=40, late_chunking=False)
    passages = list(content_of(tmp_path / "ix").values())
    alone = pipeline("sentence-embedding", model)([row["text"] for _, row in passages], prompt_name="document")
    assert [bits for bits, _ in passages] == [vector.tobytes() for vector in alone]


def test_all_vectors_are_compared(made):
    rows = made.store.passages.to_arrow().to_pylist()
    query = made.encoder("a heron", prompt_name="query")
    vectors = np.array([row["vector"] for row in rows])
    scores = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    best = [rows[i]["text"] for i in np.argsort(-scores)[:10]]
    assert [result.text for result in made.search("a heron", by="vectors")] == best


def test_words_and_both(made):
    first, *_ = made.search("when is the rent due?", by="words")
    assert (first.text, first.place.split(", ")[1]) == ("# Rent\n\nThe rent is due on Monday.", "characters 0-34")
    assert [first.text[a:b] for a, b in first.marks] == ["Rent", "rent", "due"]
    found = [made.search("when is the rent due?", top_k=100, by=by) for by in ("vectors", "words")]
    lists = [[result.text for result in one] for one in found]
    for result in made.search("when is the rent due?", top_k=3, fusion="ranks"):
        ranks = [one.index(result.text) + 1 for one in lists if result.text in one]
        assert result.score == pytest.approx(sum(1 / (60 + rank) for rank in ranks))
    lowest = [found[0][-1].score, 0.0]  # passages that are not in the list of words have none of them
    spans = [(least, one[0].score - least) for least, one in zip(lowest, found, strict=True)]
    scaled = [
        {result.text: (result.score - last) / span if span else 1 for result in one}
        for one, (last, span) in zip(found, spans, strict=True)
    ]
    for weight, how in ((1, {}), (3, {"vector_weight": 3})):
        for result in made.search("when is the rent due?", top_k=3, **how):
            wanted = weight * scaled[0].get(result.text, 0) + scaled[1].get(result.text, 0)
            assert result.score == pytest.approx(wanted)
    assert made.search("the of", by="words") == []


def test_conditions_on_columns(made):
    found = made.search("otter", where="year > 2015 AND year <= 2018")
    assert sorted(result.columns["year"] for result in found) == [2016, 2017, 2018]
    assert {result.row for result in found} == {17, 18, 19}
    assert made.search("otter", where="id_ = 'x''3'")[0].columns["id_"] == "x'3"
    for where, said in (("yea > 1", "No field named yea"), ("year >", "Expected"), ("year > 'x'", "could not convert")):
        with pytest.raises(InputError, match=f"where is .*{said}") as error:
            made.search("otter", where=where)
        assert "\n" not in str(error.value)
        assert "cargo" not in str(error.value)


def test_a_reranker_orders_the_best(made):
    made.reranker = pipeline("text-ranking", small_model())
    found = made.search("fish", top_k=3, reranked=8)
    before = open_index(made.folder).search("fish", top_k=8)
    ranked = made.reranker(query="fish", documents=[result.text for result in before], top_k=3)
    assert [(r.text, r.score) for r in found] == [(answer["text"], answer["score"]) for answer in ranked]


def test_only_what_changed_is_embedded(made, corpus, model, tmp_path):
    before = content_of(made.folder)
    report = build_index([corpus], made.folder)
    assert (report.unchanged, report.embedded) == (4, 0)
    rows = (corpus / "rows.jsonl").read_text().splitlines()
    rows[3] = json.dumps({"text": "A new row of words. " * 30, "year": 1999})
    (corpus / "rows.jsonl").write_text("\n".join(rows[:15]) + "\n")
    (corpus / "page.html").unlink()
    (corpus / "new.txt").write_text("Something new.")
    report = build_index([corpus], made.folder)
    assert (report.added, report.changed, report.removed, report.unchanged) == (1, 1, 1, 2)
    after = content_of(made.folder)
    new = {key for key in after if after[key] != before.get(key)}
    assert report.embedded == len(new) == sum("new" in after[key][1]["text"] for key in after)
    build_index([corpus], tmp_path / "again", model, passage_tokens=40)
    assert content_of(tmp_path / "again") == after
    assert [r.path for r in made.search("something new", by="words", top_k=1)] == [str(corpus / "new.txt")]
    (corpus / "rows.jsonl").write_text("\n")
    build_index([corpus / "rows.jsonl"], made.folder)
    assert {row["path"] for _, row in content_of(made.folder).values()} == {
        str(corpus / n) for n in ("new.txt", "long.txt", "inner/short.md")
    }


def test_two_orders_give_the_same_bits(made, corpus, model, tmp_path):
    for name in ("rows.jsonl", "inner", "long.txt", "page.html"):
        build_index(corpus / name, tmp_path / "other", model, passage_tokens=40)
    assert content_of(tmp_path / "other") == content_of(made.folder)


KILLED = """
import sys
from modernbert.indexing import build_index, index
index._TOGETHER = 4
print("begins", flush=True)
build_index(*sys.argv[1:4], passage_tokens=40)
"""


def test_a_killed_run_goes_on_without_loss_or_duplicates(made, corpus, model, tmp_path):
    """Killed three times: once a version more of the passages is there each time, in the midst of whatever follows."""
    other, kills = tmp_path / "other", 0
    for _ in range(3):
        run = subprocess.Popen([sys.executable, "-c", KILLED, corpus, other, model], stdout=subprocess.PIPE)
        assert run.stdout.readline() == b"begins\n"
        versions = other / "passages.lance" / "_versions"
        before = len(list(versions.glob("*.manifest")))
        while run.poll() is None and len(list(versions.glob("*.manifest"))) < before + 3:
            time.sleep(0.002)
        kills += run.poll() is None
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdout.close()
    stored = len(content_of(other))
    report = build_index(corpus, other, model)
    assert kills, "the runs were over before they could be killed"
    assert stored > 0
    assert report.passages == stored + report.embedded
    assert content_of(other) == content_of(made.folder)
    assert len(open_index(other).search("otter", by="words", top_k=100)) == len(
        made.search("otter", by="words", top_k=100)
    )


def test_another_model_other_options_and_other_folders_are_refused(made, corpus, model, tmp_path):
    for arguments, said in (
        ({"model": small_model()}, "was made with"),
        ({"passage_tokens": 41}, "passage_tokens is 41, and .* was made with 40"),
        ({"language": "English"}, "language is 'English'"),
        ({"nonsense": 1}, "has no option nonsense"),
    ):
        with pytest.raises(InputError, match=said):
            build_index(corpus, made.folder, **arguments)
    with pytest.raises(InputError, match="was made with"):
        open_index(made.folder, small_model()).search("x")
    with pytest.raises(InputError, match="is no index and not empty"):
        build_index(corpus, corpus, model)
    with pytest.raises(InputError, match="there is no file or folder"):
        build_index(corpus / "missing", made.folder)
    with pytest.raises(InputError, match=r"ends with \.png"):
        build_index(corpus / "picture.png", made.folder)
    with pytest.raises(InputError, match="is no index"):
        open_index(corpus)


def test_nothing_is_made_of_places_that_are_not_there_or_without_the_libraries(corpus, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="there is no file or folder"):
        build_index([corpus, corpus / "missing"], tmp_path / "ix")
    with pytest.raises(InputError, match="places is empty"):
        build_index([], tmp_path / "ix")
    for name in ("lancedb", "sentencex"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(InputError, match=r"ix needs \w+: pip install 'modernbert\[search\]'"):
            build_index(corpus, tmp_path / "ix")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


def test_a_model_that_changed_is_refused(corpus, model, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in [p for p in model.rglob("*") if p.is_file()]:
        (copy / path.relative_to(model)).parent.mkdir(exist_ok=True)
        (copy / path.relative_to(model)).write_bytes(path.read_bytes())
    build_index(corpus / "inner", tmp_path / "ix", copy)
    assert open_index(tmp_path / "ix", model).search("x")  # the same, elsewhere
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match="other weights"):
        open_index(tmp_path / "ix").search("x")


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_indexed(corpus, model, tmp_path, capsys):
    (corpus / "broken.txt").write_bytes(b"\xff\xff")
    (corpus / "other.csv").write_text("text,year\nA text.,soon\n")  # in rows.jsonl the year is a number
    command = ["index", corpus, "--output", tmp_path / "ix", "--model", model, "--passage-tokens", 40]
    code, out, err = called(capsys, *command)
    assert code == 1
    assert "4 added, 2 not read" in out
    assert "broken.txt is no text in UTF-8" in err
    assert "has 2000.0 in the column 'year'; in the index it is of string" in err or "has 'soon' in" in err


def test_commands(made, corpus, capsys):
    code, out, err = called(capsys, "index", corpus, "--output", made.folder)
    assert (code, err) == (0, "")
    assert "0 of them new; files: 4 unchanged" in out
    code, out, _ = called(capsys, "search", made.folder, "when is the rent due", "--top-k", 1, "--by", "words")
    assert code == 0
    assert "short.md, characters 0-34" in out
    assert "# Rent The rent is due on Monday." in out
    code, out, _ = called(capsys, "search", made.folder, "otter", "--json", "--where", "year = 2004")
    (found,) = json.loads(out)
    assert found["row"] == 5
    code, out, err = called(capsys, "search", made.folder, "otter", "--where", "yeah = 2004")
    assert code == 2
    assert err.startswith("modernbert: --where is 'yeah = 2004'")
    assert err.count("\n") == 1


def test_without_a_model_the_small_encoder_serves_and_its_vectors_weigh_half(corpus, tmp_path):
    build_index(corpus / "inner", tmp_path / "ix")
    index = open_index(tmp_path / "ix")
    (usual, *_), (half, *_), (whole, *_) = (
        index.search("rent", **how) for how in ({}, {"vector_weight": 0.5}, {"vector_weight": 1})
    )
    assert usual == half
    assert usual.score < whole.score


def test_pages_and_pairs_of_signs(model, tmp_path):
    from tests.indexing.test_documents import pdf_of

    pytest.importorskip("pypdf", reason="the extra `search` is not installed")
    (tmp_path / "a.pdf").write_bytes(pdf_of("One is here. " * 20, "The second page has words."))
    build_index(tmp_path / "a.pdf", tmp_path / "ix", model, passage_tokens=16)
    (found, *_) = open_index(tmp_path / "ix").search("second", by="words")
    assert found.page == 2
    (tmp_path / "zh.txt").write_text("房租星期一到期。水獭住在河边。", encoding="utf-8")
    build_index(tmp_path / "zh.txt", tmp_path / "zh", model, language="zh", passage_tokens=16)
    found, *_ = open_index(tmp_path / "zh").search("水獭", by="words")
    assert "水獭" in found.text


@pytest.mark.parametrize(
    ("question", "marked"),
    [("quantized model", ["Quantize", "models"]), ("river", []), ("MODEL?", ["models"]), ("the of", [])],
)
def test_marked_words(question, marked):
    text = "Quantize the models of rivets."
    assert [text[a:b] for a, b in index.marks_of(text, index._words(question))] == marked


def test_the_server_gives_what_the_index_gives(made, heads):
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    import asyncio

    import httpx

    from modernbert.serving import create_app

    rank = ModernBertForSequenceClassification.from_pretrained(heads / "SequenceClassification", num_labels=1)
    ranking = pipeline("text-ranking", rank.eval(), made.encoder.tokenizer)
    app = create_app({"rank": ranking}, index=[f"notes={made.folder}"], access_log=False)

    def ask(**body):
        async def run():
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.post("/v1/search", json=body)

        return asyncio.run(run())

    def same(reply, **options):
        wanted = [json.loads(json.dumps(dataclasses.asdict(one))) for one in made.search("otters", **options)]
        return wanted and reply.json()["results"] == wanted

    assert same(ask(query="otters", top_k=4), top_k=4)
    assert same(ask(query="otters", index="notes", by="words", where="year > 2010"), by="words", where="year > 2010")
    where = "NOT (year < 2010) AND year IN (2011, 2012) AND text != 'call(it)'"
    assert same(ask(query="otters", where=where), where=where)
    made.reranker = ranking
    assert same(ask(query="otters", rerank="rank", reranked=7, top_k=3), reranked=7, top_k=3)
    for status, said, body in (
        (404, "there is no index 'x'; this server has notes", {"index": "x"}),
        (422, "where is 'yeah'", {"where": "yeah"}),
        (422, "where", {"where": "(" * 1001}),
        (422, r"where holds 'repeat\('", {"where": "year IN (2001) AND (repeat(text, 9)) = ''"}),
        (422, "where holds", {"where": 'year > 1 OR "repeat" (text, 9) = text'}),
        (422, "where holds '/\\*'", {"where": "year /**/ > 1"}),
        (404, "cannot do text-ranking|there is no model", {"rerank": "nothing"}),
    ):
        reply = ask(query="otters", **body)
        assert reply.status_code == status
        assert re.search(said, reply.text)
    app.state.serving.close()
