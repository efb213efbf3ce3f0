"""Answers of several models to the same texts from one pass of the encoder that they share."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from modernbert.pipelines.options import OPTIONS
from modernbert.serving.bodies import Body, Texts, example
from modernbert.serving.problems import RequestError
from modernbert.serving.replies import Json
from modernbert.serving.routes.tasks import UNSERVED
from modernbert.serving.state import state_of

router = APIRouter(tags=["Tasks"])

_MOST = 64  # answers to a text


class Wanted(Body):
    """One of the answers: a model, a task of it, or both."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = Field(None, description="Name of the model; by default one that can do the task.")
    task: str | None = Field(
        None, description="By default what the model was made for.", json_schema_extra={"enum": [*OPTIONS]}
    )
    options: dict[str, Any] | None = Field(None, description="Options of the task, as of `/v1/tasks/TASK`.")


class AnswersRequest(Body):
    model_config = example(
        inputs=["A cat sat.", "Rain fell."],
        answers={
            "vector": {"task": "sentence-embedding", "options": {"normalize": True}},
            "states": {"task": "feature-extraction"},
        },
    )

    inputs: Texts
    answers: Annotated[dict[str, Wanted], Field(json_schema_extra={"minProperties": 1})] | None = Field(
        None, description="What to give, by names of your own; by default what each model that shares an encoder does."
    )


class Source(BaseModel):
    """What gave an answer."""

    model: str
    task: str


class AnswersReply(BaseModel):
    """For each input its answers by their names, and what gave each."""

    answers: list[dict[str, Any]]
    sources: dict[str, Source]
    usage: dict[str, int]


@router.post("/v1/answers", summary="Several answers from one pass", response_model=AnswersReply)
async def answers(given: AnswersRequest, request: Request) -> Json:
    """Answers of models that share an encoder, which reads each text once. Each has the bits that `/v1/tasks/TASK`
    gives; `GET /v1/tasks` says which models share an encoder."""
    state = state_of(request)
    if given.answers is not None and not 0 < len(given.answers) <= _MOST:
        raise RequestError(f"answers names {len(given.answers)} answers; ask for 1 to {_MOST}")
    asked = given.answers or {}
    if empty := [name for name, want in asked.items() if not (want.model or want.task)]:
        raise RequestError(f"answers: {empty[0]} names neither a model nor a task; give one of them, or both")
    one, chosen = state.models.find_together([(want.model, want.task) for want in asked.values()])
    names = list(asked) or [what.served.name for what in chosen]
    keys = [what.key for what in chosen]
    if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
        raise RequestError(f"two answers are {twice[0]}; ask for the second one in a request of its own")
    wanted = []
    for name, what in zip(names, chosen, strict=True):
        options = dict((asked[name].options if name in asked else None) or {})
        if idle := [option for option in options if option in UNSERVED]:
            raise RequestError(
                f"{name}: {what.task} has no option {idle[0]} here, which means something in Python alone"
            )
        if what.task == "feature-extraction":
            options["return_tensors"] = "pt"
        wanted.append((what, options))
    texts = [given.inputs] if isinstance(given.inputs, str) else given.inputs
    answered = await state.answer_together(request, one, wanted, texts)
    found = [{name: answer[key] for name, key in zip(names, keys, strict=True)} for answer in answered.answers]
    sources = {name: {"model": what.served.name, "task": what.task} for name, what in zip(names, chosen, strict=True)}
    usage = {"tokens": answered.tokens, "truncated": answered.cut}
    return Json({"answers": found, "sources": sources, "usage": usage})
