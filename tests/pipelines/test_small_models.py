"""The small models that come with the package: whole, small, read by the libraries whose folders they are, and able."""

import numpy as np
import pytest
import transformers

from modernbert import pipeline
from modernbert.pipelines import TASKS, small_model

SMALL = list(dict.fromkeys(name for _, name in TASKS.values() if name is not None))
# A question, what answers it, and what does not. They were written before the models were tried on them.
QUESTIONS = [
    ("how can I get a new card", "I lost my card and would like another one sent to me.", "Play some music."),
    ("what will the weather be like tomorrow", "will it rain tomorrow", "transfer money to my savings account"),
    ("Who wrote the novel?", "The novel was written by Charles Dickens in 1850.", "The river flows into the sea."),
    ("When did the war end?", "The war ended in November 1918.", "The species is found in tropical forests."),
    ("Where was she born?", "She was born in London and grew up in Kent.", "The company sells computers."),
    ("set an alarm for six", "wake me up at 6 am", "what is my bank balance"),
    ("history of the railway station", "The station was opened by the railway in 1873.", "He plays the guitar."),
    ("how old is the queen", "tell me the age of the queen", "book a table for two"),
]


def test_a_folder_is_whole_and_has_at_most_ten_megabytes():
    for name in SMALL:
        folder = small_model(name)
        names = {path.name for path in folder.iterdir()}
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
        assert sum(path.stat().st_size for path in folder.rglob("*")) <= 10 * 10**6
    assert {path.name for path in small_model().parent.iterdir() if path.is_dir()} == set(SMALL)


@pytest.mark.parametrize(("name", "words"), [("encoder", 2048), ("decoder", 8192)])
def test_transformers_reads_the_language_models(name, words):
    kind = transformers.AutoModelForMaskedLM if name == "encoder" else transformers.AutoModelForCausalLM
    assert kind.from_pretrained(small_model(name)).config.vocab_size == words


def test_sentence_transformers_reads_the_encoders():
    peers = pytest.importorskip("sentence_transformers")
    texts = [question for question, _, _ in QUESTIONS]
    theirs = peers.SentenceTransformer(str(small_model("sentence-encoder")), device="cpu").float().encode(texts)
    np.testing.assert_allclose(pipeline("sentence-embedding")(texts), theirs, atol=1e-5)
    sparse = peers.SparseEncoder(str(small_model("sparse-encoder")), device="cpu").float()
    ours = pipeline("sparse-embedding").csr(texts, is_query=True).toarray()
    np.testing.assert_allclose(ours, sparse.encode_query(texts).to_dense().numpy(), atol=1e-5)
    if hasattr(peers, "MultiVectorEncoder"):
        late = peers.MultiVectorEncoder(str(small_model("multi-vector-encoder")), device="cpu").float()
        for ours, theirs in zip(
            pipeline("late-interaction")(texts, is_query=True), late.encode_query(texts), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("task", ["sentence-embedding", "sparse-embedding", "text-ranking"])
def test_what_answers_a_question_is_ranked_before_what_does_not(task):
    model = small_model(TASKS[task][1])
    right = 0
    for question, answer, other in QUESTIONS:
        if task == "sparse-embedding":
            serve = pipeline(task)
            vectors = serve.csr([answer, other])
            scores = (serve.csr([question]) @ vectors.T).toarray()[0]
            right += scores[0] > scores[1]
        else:
            right += pipeline("text-ranking", model)(query=question, documents=[other, answer])[0]["index"] == 1
    assert right >= 7
