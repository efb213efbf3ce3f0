"""A server in this process: an app with a model for every head, asked without a network."""

import asyncio

import httpx
import pytest
import torch

pytest.importorskip("fastapi")

from modernbert.pipelines import pipeline
from modernbert.serving import create_app

TASKS = {
    "fill": ("MaskedLM", "fill-mask"),
    "embed": ("Model", "sentence-embedding"),
    "tag": ("TokenClassification", "token-classification"),
    "classify": ("SequenceClassification", "text-classification"),
    "answer": ("QuestionAnswering", "question-answering"),
    "choose": ("MultipleChoice", "multiple-choice"),
    "decode": ("CausalLM", "text-generation"),
}


@pytest.fixture(scope="session")
def pipelines(heads):
    """The offline pipelines, by the names that their models have on the server."""
    import modernbert

    found = {name: pipeline(task, heads / head, dtype="float32") for name, (head, task) in TASKS.items()}
    model = modernbert.ModernBertForSequenceClassification.from_pretrained(
        heads / "SequenceClassification", num_labels=1
    ).eval()
    torch.manual_seed(0)
    body = modernbert.MultiVectorEncoder(
        found["embed"].model.model, modernbert.MultiVectorSettings(document_length=128)
    )
    made = {
        "rank": ("text-ranking", model),
        "sparse": ("sparse-embedding", modernbert.SparseEncoder(found["fill"].model)),
        "late": ("late-interaction", body.eval()),
    }
    return found | {name: pipeline(task, one, found["classify"].tokenizer) for name, (task, one) in made.items()}


@pytest.fixture(scope="session")
def app(pipelines):
    made = create_app(pipelines, access_log=False)
    yield made
    made.state.serving.models.close()


@pytest.fixture
def ask(app):
    """Ask the app: a reply to a path and a body."""

    def one(path, body=None, method=None, headers=None):
        async def run():
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
                if isinstance(body, bytes):
                    return await client.request(method or "POST", path, content=body, headers=headers)
                return await client.request(
                    method or ("GET" if body is None else "POST"), path, json=body, headers=headers
                )

        return asyncio.run(run())

    return one
