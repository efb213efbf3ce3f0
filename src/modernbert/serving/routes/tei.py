"""text-embeddings-inference's API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Field

from modernbert import __version__
from modernbert.serving.bodies import Body, Id, Pair, Text, Texts, Whole, example
from modernbert.serving.models import Served
from modernbert.serving.problems import RequestError, UnknownModelError
from modernbert.serving.replies import Json
from modernbert.serving.state import check_options, state_of
from modernbert.serving.vectors import BYTES, as_bytes

router = APIRouter(tags=["text-embeddings-inference"])

_ALL = 2**31 - 1  # labels


class _Request(Body):
    model: str | None = Field(None, description="Name of the model; by default the first that can do this.")
    truncate: bool | None = Field(None, description="Cut texts that are too long, instead of refusing them.")
    truncation_direction: Literal["Right", "right"] = "Right"


class EmbedRequest(_Request):
    model_config = example(inputs=["A cat sat.", "Rain fell."])

    inputs: Texts
    normalize: bool = True
    prompt_name: str | None = None
    dimensions: Whole | None = Field(None, ge=1)


class EmbedAllRequest(_Request):
    model_config = example(inputs="A cat sat.")

    inputs: Texts
    prompt_name: str | None = None


class EmbedSparseRequest(_Request):
    model_config = example(inputs="A cat sat.")

    inputs: Texts
    prompt_name: str | None = None


class PredictRequest(_Request):
    model_config = example(inputs="I like it.")

    inputs: Text | Pair | Annotated[list[Pair], Field(json_schema_extra={"minItems": 1})] = Field(
        description="A text, a pair of texts, or a list of lists of one or two texts."
    )
    raw_scores: bool = False


class EndpointRequest(_Request):
    model_config = example(inputs=["A cat sat.", "Rain fell."])

    inputs: Texts | Annotated[list[Pair], Field(json_schema_extra={"minItems": 1})]
    normalize: bool = True
    prompt_name: str | None = None
    raw_scores: bool = False


class Sentences(Body):
    """A sentence, and those that it is compared with."""

    source_sentence: Text
    sentences: Annotated[list[Text], Field(json_schema_extra={"minItems": 1})]


class Parameters(Body):
    """How sentences are read."""

    model_config = ConfigDict(strict=True, extra="forbid")

    truncate: bool | None = None
    truncation_direction: Literal["Right", "right"] = "Right"
    prompt_name: str | None = None


class SimilarityRequest(Body):
    model_config = example(inputs={"source_sentence": "A cat sat.", "sentences": ["Rain fell."]})

    inputs: Sentences
    parameters: Parameters = Parameters()
    model: str | None = None


class TokenizeRequest(Body):
    model_config = example(inputs="A cat sat.")

    inputs: str | list[str]
    add_special_tokens: bool = True
    prompt_name: str | None = None
    model: str | None = None


class DecodeRequest(Body):
    model_config = example(ids=[5, 6, 7])

    ids: list[Id] | list[list[Id]]
    skip_special_tokens: bool = True
    model: str | None = None


def _listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


async def _vectors(given: EmbedRequest | EmbedAllRequest, request: Request, **options: Any) -> list[Any]:
    options |= {"prompt_name": given.prompt_name, "truncation": given.truncate}
    _, _, answered = await state_of(request).answer(
        request, "sentence-embedding", given.model, _listed(given.inputs), options
    )
    return answered.answers


@router.post("/embed", summary="Vectors of texts")
async def embed(given: EmbedRequest, request: Request) -> Response:
    """A list of vectors, of length one unless `normalize` is false; with the header `Accept: application/octet-stream`
    their bytes alone, as of `/v1/embeddings`."""
    vectors = await _vectors(given, request, normalize=given.normalize, truncate_dim=given.dimensions)
    return as_bytes(np.stack(vectors)) if BYTES in request.headers.get("accept", "") else Json(vectors)


@router.post("/embed_all", summary="A vector of every token")
async def embed_all(given: EmbedAllRequest, request: Request) -> Json:
    """For each text the states of its tokens, not pooled and not scaled."""
    return Json(await _vectors(given, request, multi_vector=True, normalize=False))


@router.post("/embed_sparse", summary="Sparse vectors of texts")
async def embed_sparse(given: EmbedSparseRequest, request: Request) -> Json:
    """For each text the entries of the vocabulary that have a weight."""
    options = {"prompt_name": given.prompt_name, "truncation": given.truncate}
    _, _, answered = await state_of(request).answer(
        request, "sparse-embedding", given.model, _listed(given.inputs), options
    )
    pairs = (zip(a["indices"].tolist(), a["values"].tolist(), strict=True) for a in answered.answers)
    return Json([[{"index": index, "value": value} for index, value in one] for one in pairs])


@router.post("/predict", summary="Labels of texts")
async def predict(given: PredictRequest, request: Request) -> Json:
    """The scores of all labels, best first: one list for a text or a pair, a list of lists for several."""
    one = isinstance(given.inputs, str) or (bool(given.inputs) and isinstance(given.inputs[0], str))
    several: list[Any] = [given.inputs] if one else list(given.inputs)
    items = [_pair([item] if isinstance(item, str) else item) for item in several]
    options = {"top_k": _ALL, "truncation": given.truncate, "function_to_apply": "none" if given.raw_scores else None}
    _, _, answered = await state_of(request).answer(request, "text-classification", given.model, items, options)
    answers = [answer if isinstance(answer, list) else [answer] for answer in answered.answers]
    return Json(answers[0] if one else answers)


@router.post("/", summary="What the model was made for: vectors or labels of texts")
async def endpoint(given: EndpointRequest, request: Request) -> Response:
    """As `/predict` where the model classifies, and else as `/embed`, for clients that know an endpoint alone. A list
    of texts is several inputs."""
    classifies = "text-classification" in _served(request, given.model).pipelines
    inputs = [given.inputs] if isinstance(given.inputs, str) else given.inputs
    if classifies:
        items = [[item] if isinstance(item, str) else item for item in inputs]
        one = isinstance(given.inputs, str)
        return await predict(
            PredictRequest.model_validate(vars(given) | {"inputs": items[0] if one else items}), request
        )
    if not all(isinstance(item, str) for item in inputs):
        raise RequestError("inputs holds pairs; this model takes a text or a list of texts")
    return await embed(EmbedRequest.model_validate(vars(given)), request)


def _pair(texts: list[str]) -> Any:
    if len(texts) == 1:
        return texts[0]
    if len(texts) != 2:
        raise RequestError(f"an input holds {len(texts)} texts; it is a text or a pair of texts")
    return {"text": texts[0], "text_pair": texts[1]}


@router.post("/similarity", summary="How alike sentences are to one")
async def similarity(given: SimilarityRequest, request: Request) -> Json:
    """The cosine of the vectors of each sentence and the first one."""
    if not given.inputs.sentences:
        raise RequestError("sentences is empty; give at least one")
    of, texts = given.parameters, [given.inputs.source_sentence, *given.inputs.sentences]
    read = {"inputs": texts, "model": given.model, "prompt_name": of.prompt_name, "truncate": of.truncate}
    first, *others = await _vectors(EmbedRequest.model_validate(read), request, normalize=True)
    return Json([float((first * other).sum()) for other in others])


def _served(request: Request, name: str | None) -> Served:
    """A model by its name, or the first."""
    models = state_of(request).models
    if name is not None and name not in models.served:
        raise UnknownModelError(f"there is no model {name!r}; this server has {', '.join(sorted(models.served))}")
    return models.served[name] if name is not None else next(iter(models.served.values()))


@router.post("/tokenize", summary="Tokens of texts")
async def tokenize(given: TokenizeRequest, request: Request) -> Json:
    """For each text its tokens with their ids and places: characters from `start` to before `stop`."""
    pipeline: Any = _served(request, given.model).first
    texts = _listed(given.inputs)
    if not texts:
        return Json([])
    check_options({"inputs": texts})
    prompt = pipeline.prompt(given.prompt_name) if hasattr(pipeline, "prompt") and given.prompt_name else ""
    found = await state_of(request).aside(
        pipeline,
        texts,
        lambda: (
            pipeline.tokenizer(
                [prompt + text for text in texts], add_special_tokens=given.add_special_tokens, truncation=False
            ).encodings
        ),
    )
    replies = []
    for text, encoding in zip(texts, found, strict=True):
        text = prompt + text
        tokens = []
        parts = zip(encoding.ids, encoding.tokens, encoding.offsets, encoding.special_tokens_mask, strict=True)
        for number, token, (start, stop), special in parts:
            place = {"start": None, "stop": None} if special else {"start": start, "stop": stop}
            tokens.append(
                {"id": number, "text": token if special else text[start:stop], "special": bool(special), **place}
            )
        replies.append(tokens)
    return Json(replies)


@router.post("/decode", summary="Texts of token ids")
async def decode(given: DecodeRequest, request: Request) -> Json:
    """A list of texts."""
    pipeline: Any = _served(request, given.model).first
    several: list[Any] = [given.ids] if given.ids and isinstance(given.ids[0], int) else list(given.ids)
    size = len(pipeline.tokenizer)
    for ids in several:
        if wrong := [i for i in ids if not 0 <= i < size]:
            raise RequestError(f"ids hold {wrong[0]}; the tokenizer has ids 0 to {size - 1}")
    decode, skip = pipeline.tokenizer.decode, given.skip_special_tokens
    return Json(
        await state_of(request).aside(
            pipeline, several, lambda: [decode(ids, skip_special_tokens=skip) for ids in several]
        )
    )


@router.get("/info", summary="What this server is")
async def info(request: Request) -> Json:
    """The first model in text-embeddings-inference's words, and the names of all."""
    state = state_of(request)
    first = next(iter(state.models.served.values()))
    model = first.first.model
    return Json(
        {
            "model_id": first.source,
            "model_dtype": str(model.dtype).removeprefix("torch."),
            "model_type": {task: {} for task in first.pipelines},
            "max_input_length": first.context,
            "max_batch_tokens": state.models.engine(first.first).batch_tokens,
            "max_client_batch_size": state.options.most_texts,
            "auto_truncate": state.options.truncate,
            "tokenization_workers": state.options.tokenizer_threads,
            "version": __version__,
            "models": {served.name: list(served.pipelines) for served in state.models.served.values()},
        }
    )
