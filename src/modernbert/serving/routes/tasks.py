"""A route for every task, with the options of its pipeline."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, create_model

from modernbert.checks import OptionField, fields_of
from modernbert.pipelines.options import OPTIONS
from modernbert.serving.bodies import Whole
from modernbert.serving.replies import Json
from modernbert.serving.state import state_of

router = APIRouter(tags=["Tasks"])

# An input of each task, and options where it needs any.
EXAMPLES: dict[str, tuple[Any, dict[str, Any]]] = {
    "fill-mask": ("The capital of France is [MASK].", {"top_k": 3}),
    "text-classification": ("I like it.", {}),
    "zero-shot-classification": ("My card was swallowed.", {"candidate_labels": ["banking", "travel"]}),
    "token-classification": ("Anna lives in Paris.", {"aggregation_strategy": "simple"}),
    "question-answering": ({"question": "Where does Anna live?", "context": "Anna lives in Paris."}, {}),
    "multiple-choice": ({"prompt": "The sky is", "choices": ["blue.", "a fish."]}, {}),
    "feature-extraction": ("A cat sat.", {}),
    "sentence-embedding": ({"text": "A cat sat. Rain fell.", "spans": [[0, 10], [11, 21]]}, {}),
    "sparse-embedding": ("A cat sat.", {"top_k": 8, "form": "tokens"}),
    "late-interaction": ("A cat sat.", {"is_query": True}),
    "text-ranking": ({"query": "What do plants need?", "documents": ["Plants need light.", "Rain fell."]}, {}),
    "text-generation": ("Once upon a time", {"max_new_tokens": 8, "seed": 1}),
    "text-scoring": ("A cat sat.", {}),
}
# Options that mean something in Python alone.
UNSERVED = (
    "padding",
    "return_tensors",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "streamer",
    "generation_config",
    "assistant_model",
)


class Answers(BaseModel):
    """An answer for each input, in the same order."""

    model: str
    task: str
    answers: list[Any]
    usage: dict[str, int]


def _json(kind: Any) -> Any:
    """A type as JSON has it: lists for tuples, and one kind of number."""
    if typing.get_origin(kind) in (list, tuple):
        return list[_json(typing.get_args(kind)[0])]  # type: ignore[misc]
    return Whole if kind is int else kind


def _kind(field: OptionField) -> Any:
    """The type of an option, for the schema of requests; the library's own check says what is wrong with a value."""
    limits = {
        "minimum": field.limits.least, "maximum": field.limits.most,
        "exclusiveMinimum": field.limits.above, "exclusiveMaximum": field.limits.below,
    }  # fmt: skip
    extra: Any = {name: limit for name, limit in limits.items() if limit is not None}
    members: list[Any] = [
        Annotated[_json(kind), Field(json_schema_extra=extra)] if kind in (int, float) else _json(kind)
        for kind in field.kinds
        if not (field.choices and kind is str)
    ]
    if field.choices:
        members.append(Literal[field.choices])
    return typing.Union[(*members, types.NoneType)] if members else Any


_TEXT = {"type": "string", "minLength": 1, "pattern": r"\S"}
_MASKED = {"type": "string", "pattern": r"\[MASK\]"}


def _inputs(task: str) -> dict[str, Any]:
    """The schema of a task's inputs, for programs; the pipeline's own check says what is wrong with one."""
    item, _ = EXAMPLES[task]
    one: dict[str, Any] = _MASKED if task == "fill-mask" else _TEXT
    if isinstance(item, dict):
        texts = {"type": "array", "items": _TEXT, "minItems": 1}
        parts = {name: texts if isinstance(value, list) else _TEXT for name, value in item.items() if name != "spans"}
        fields: dict[str, Any] = {"type": "object", "properties": parts, "required": list(parts)}
        one = {"anyOf": [_TEXT, fields]} if task == "sentence-embedding" else fields
    return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}


def _add(task: str) -> None:
    fields = [field for field in fields_of(OPTIONS[task]) if field.name not in UNSERVED]
    shape = "".join(word.capitalize() for word in task.split("-"))
    strict = ConfigDict(extra="forbid", strict=True)
    described: dict[str, Any] = {
        field.name: (_kind(field), Field(None, description=field.described)) for field in fields
    }
    options = create_model(f"{shape}Options", __config__=strict, **described)
    example: Any = {"inputs": [EXAMPLES[task][0]], "options": EXAMPLES[task][1]}
    body = create_model(
        f"{shape}Request",
        __config__=ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [example]}),
        inputs=(Any, Field(description="One input of the task, or a list of them.", json_schema_extra=_inputs(task))),
        model=(str | None, Field(None, description="Name of the model; by default the first that can do the task.")),
        options=(options | None, Field(None, description="Options of the task.")),
    )

    async def run(given: Any, request: Request) -> Json:
        inputs = given.inputs if isinstance(given.inputs, list) else [given.inputs]
        chosen = {} if given.options is None else given.options.model_dump(exclude_unset=True)
        if task == "feature-extraction":
            chosen["return_tensors"] = "pt"
        name, _, answered = await state_of(request).answer(request, task, given.model, inputs, chosen)
        usage = {"tokens": answered.tokens, "truncated": answered.cut}
        return Json({"model": name, "task": task, "answers": answered.answers, "usage": usage})

    run.__annotations__["given"] = body
    run.__doc__ = f"The answers of `pipeline({task!r})`."
    router.post(f"/v1/tasks/{task}", summary=task, response_model=Answers, name=task)(run)


for _task in OPTIONS:
    _add(_task)


@router.get("/v1/tasks", summary="Tasks of this server")
async def tasks(request: Request) -> Json:
    """The models of each task that this server can do, the names of its options, and which models share an encoder."""
    served = state_of(request).models.served.values()
    found: dict[str, Any] = {}
    for task in OPTIONS:
        if names := [one.name for one in served if task in one.pipelines]:
            options = [field.name for field in dataclasses.fields(OPTIONS[task]) if field.name not in UNSERVED]
            found[task] = {"models": names, "options": options}
    return Json({"tasks": found, "sharing": state_of(request).models.sharing})
