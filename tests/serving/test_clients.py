"""Clients of libraries for retrieval, over loopback: each gets the vectors, scores and texts of the routes.

They are too large for the packages of these tests: without them a test is skipped, and the slow one runs them all in an
environment of their own.
"""

import subprocess
import sys

import httpx
import numpy as np
import pytest

from modernbert.pipelines import small_model
from tests.interop.environments import pytest_over
from tests.serving.test_server import Running

pytestmark = [
    pytest.mark.network,
    pytest.mark.filterwarnings("ignore"),  # of these libraries, which are not ours to mend
]
PACKAGES = (
    "langchain-openai==1.7.4",
    "langchain-huggingface==1.2.3",
    "langchain-cohere==0.6.0",
    "llama-index-embeddings-openai==0.7.0",
    "llama-index-embeddings-text-embeddings-inference==0.6.0",
    "llama-index-postprocessor-tei-rerank==0.6.0",
    "llama-index-postprocessor-cohere-rerank==0.10.0",
    "opentelemetry-sdk==1.45.2",
    "opentelemetry-instrumentation-fastapi==0.66b2",
)
TEXTS, QUERY = ["A cat sat on the mat.", "Rain fell.", "Prices rose by a third."], "What sat?"
KEY = "secret"


def uses(*names):
    """Give a test the library by this name, before a server is started for it; without it the test is skipped."""
    return pytest.mark.parametrize("library", names, indirect=True)


@pytest.fixture(scope="module")
def library(request):
    return pytest.importorskip(request.param)


@pytest.fixture(scope="module")
def url():
    with Running("--no-access-log", MODERNBERT_API_KEY=KEY) as server:
        yield server.url


@pytest.fixture(scope="module")
def asked(url):
    """What the routes say themselves: vectors as they are and of length one, and the documents from best to worst."""
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}) as client:
        rows = client.post("/v1/embeddings", json={"input": [*TEXTS, QUERY]}).json()["data"]
        unit = client.post("/embed", json={"inputs": [*TEXTS, QUERY]}).json()
        ranked = client.post("/v2/rerank", json={"query": QUERY, "documents": TEXTS}).json()["results"]
    return [row["embedding"] for row in rows], unit, [(one["index"], one["relevance_score"]) for one in ranked]


def same(found, wanted):
    return np.array_equal(np.array(found, np.float32), np.array(wanted, np.float32))


@pytest.mark.parametrize(
    "how",
    [
        {"check_embedding_ctx_length": False},  # texts as they are
        {"tiktoken_enabled": False, "tiktoken_model_name": str(small_model("encoder"))},  # the model's own token ids
    ],
)
@uses("langchain_openai")
def test_langchain_openai(library, url, asked, how):
    client = library.OpenAIEmbeddings(model="small-sentence-encoder", base_url=f"{url}/v1", api_key=KEY, **how)
    assert same([*client.embed_documents(TEXTS), client.embed_query(QUERY)], asked[0])


@uses("langchain_openai")
def test_ids_of_another_tokenizer_are_refused(library, url):
    """As LangChain sends them by default, where it has OpenAI's tokenizer."""
    import openai
    import tiktoken

    bytes_alone = {bytes([i]): 99_000 + i for i in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=bytes_alone, special_tokens={})
    tiktoken.registry.ENCODINGS["cl100k_base"] = encoding
    try:
        client = library.OpenAIEmbeddings(model="small-sentence-encoder", base_url=f"{url}/v1", api_key=KEY)
        with pytest.raises(openai.UnprocessableEntityError, match="vocabulary"):
            client.embed_documents(TEXTS)
    finally:
        del tiktoken.registry.ENCODINGS["cl100k_base"]


@uses("langchain_openai")
def test_langchain_openai_generates(library, url):
    client = library.OpenAI(model="small-decoder", base_url=f"{url}/v1", api_key=KEY, max_tokens=8, temperature=0)
    text = client.invoke("Once upon a time")
    assert text
    assert "".join(client.stream("Once upon a time")) == text
    assert client.batch(["Once upon a time", "Rain"])[0] == text


@uses("langchain_huggingface")
def test_langchain_huggingface(library, url, asked):
    from huggingface_hub import InferenceClient

    client = library.HuggingFaceEndpointEmbeddings(model="small/encoder", huggingfacehub_api_token="none")
    client.client = InferenceClient(url, token=KEY)  # `model` takes no address in this version
    assert same([*client.embed_documents(TEXTS), client.embed_query(QUERY)], asked[1])


@uses("langchain_cohere")
def test_langchain_cohere(library, url, asked):
    from langchain_core.documents import Document

    client = library.CohereRerank(cohere_api_key=KEY, base_url=url, model="small-sentence-encoder", top_n=2)
    found = client.rerank(TEXTS, QUERY)
    assert [(one["index"], one["relevance_score"]) for one in found] == asked[2][:2]
    documents = client.compress_documents([Document(text) for text in TEXTS], QUERY)
    assert [one.page_content for one in documents] == [TEXTS[i] for i, _ in asked[2][:2]]


@uses("llama_index.embeddings.openai")
def test_llama_index_openai(library, url, asked):
    client = library.OpenAIEmbedding(model_name="small-sentence-encoder", api_base=f"{url}/v1", api_key=KEY)
    assert same([*client.get_text_embedding_batch(TEXTS), client.get_query_embedding(QUERY)], asked[0])


@uses("llama_index.embeddings.text_embeddings_inference")
def test_llama_index_text_embeddings_inference(library, url, asked):
    client = library.TextEmbeddingsInference(model_name="small-sentence-encoder", base_url=url, auth_token=KEY)
    client.query_instruction = client.text_instruction = ""
    assert same([*client.get_text_embedding_batch(TEXTS), client.get_query_embedding(QUERY)], asked[1])


@uses("llama_index.postprocessor.tei_rerank", "llama_index.postprocessor.cohere_rerank")
def test_llama_index_reranks(library, url, asked):
    from llama_index.core.schema import NodeWithScore, TextNode

    if library.__name__.endswith("tei_rerank"):
        client = library.TextEmbeddingInference(base_url=url, top_n=2, model_name="small-sentence-encoder")
        client.auth_token = f"Bearer {KEY}"
    else:
        client = library.CohereRerank(api_key=KEY, base_url=url, top_n=2, model="small-sentence-encoder")
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
    found = client.postprocess_nodes(nodes, query_str=QUERY)
    assert [(one.text, one.score) for one in found] == [(TEXTS[i], score) for i, score in asked[2][:2]]


def test_a_request_is_a_span_with_its_parent_route_model_and_tokens():
    pytest.importorskip("opentelemetry.sdk.trace")
    pytest.importorskip("opentelemetry.instrumentation.fastapi")
    code = """
import asyncio, httpx
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
kept, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(kept))
trace.set_tracer_provider(provider)
from modernbert.serving import create_app
app = create_app(access_log=False)
async def run():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
        await client.post("/embed", json={"inputs": "A cat sat."}, headers=headers)
        await client.post("/embed", json={"inputs": ""})
asyncio.run(run())
for span in kept.get_finished_spans():
    if span.kind is trace.SpanKind.SERVER:
        parent, told = span.parent and format(span.parent.span_id, "016x"), span.attributes
        names = ("http.route", "modernbert.model", "modernbert.tokens", "modernbert.truncated", "http.status_code")
        print(span.name, parent, *(told.get(name) for name in names), "modernbert.problem" in told)
app.state.serving.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        "POST /embed b7ad6b7169203331 /embed small-sentence-encoder 7 0 200 False",
        "POST /embed None /embed small-sentence-encoder None None 422 True",
    ]


@pytest.mark.slow
def test_all_of_them_in_an_environment_of_their_own(tmp_path):
    """Over the packages that are installed here."""
    shown = pytest_over("clients", PACKAGES, [__file__], tmp_path)
    assert "1 skipped" in shown, shown[-2000:]  # this one
