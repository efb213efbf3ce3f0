"""Tables of `datasets`, and encoders of sentence-transformers that hold our models."""

import datasets
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from torch.utils.data import DataLoader

import modernbert
from modernbert.pipelines import small_model

TEXTS = ["One text.", "Another, somewhat longer text.", "A third one."]


@pytest.fixture(scope="module")
def tokenizer():
    return modernbert.AutoTokenizer.from_pretrained(small_model())


def test_a_table_is_encoded_and_answered_by_map(tokenizer):
    model = modernbert.AutoModelForMaskedLM.from_pretrained(small_model())
    rows = datasets.Dataset.from_dict({"text": TEXTS})

    def encode(batch):
        return tokenizer(batch["text"], truncation=True, padding="max_length", max_length=12)

    def answer(batch):
        with torch.no_grad():
            return {"best": model(batch["input_ids"], batch["attention_mask"]).logits.argmax(-1)}

    encoded = rows.map(encode, batched=True, remove_columns=["text"])
    encoding = tokenizer(TEXTS, truncation=True, padding="max_length", max_length=12, return_tensors="pt")
    assert encoded["input_ids"][:] == encoding["input_ids"].tolist()
    answered = encoded.with_format("torch").map(answer, batched=True, batch_size=2)
    with torch.no_grad():
        expected = model(**encoding).logits.argmax(-1)
    assert torch.equal(torch.stack(list(answered["best"])), expected)
    batch = next(iter(DataLoader(encoded.with_format("torch"), batch_size=3)))
    assert torch.equal(model(**batch).logits.argmax(-1), expected)


def test_an_encoder_of_sentence_transformers_runs_our_model(tmp_path, tokenizer):
    modernbert.AutoModel.from_pretrained(small_model()).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    transformer = modules.Transformer(str(tmp_path))
    theirs = SentenceTransformer(
        modules=[transformer, modules.Pooling(transformer.get_embedding_dimension(), "mean")], device="cpu"
    )
    expected = theirs.encode(TEXTS)
    transformer.model = modernbert.AutoModel.from_pretrained(tmp_path)
    np.testing.assert_allclose(theirs.encode(TEXTS), expected, rtol=0, atol=1e-5)
    loss = theirs(theirs.preprocess(TEXTS))["sentence_embedding"].square().sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in transformer.model.parameters())
    theirs.save(str(tmp_path / "saved"))
