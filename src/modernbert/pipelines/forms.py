"""The fields of each task's inputs. Nothing here imports torch."""

from __future__ import annotations

from modernbert.io.tables.columns import Field

# The field that may be called "text" is what an argument or a line of text stands for.
Form = tuple[Field, ...]
FORMS: dict[str, Form] = {
    "text-classification": (Field("text"), Field("text_pair", required=False)),
    "question-answering": (Field("question"), Field("context", ("text",))),
    "multiple-choice": (Field("prompt"), Field("choices", ("text",), many=True, alone=False)),
    "text-ranking": (Field("query"), Field("documents", ("text",), many=True)),
}


def form_of(task: str) -> Form:
    """The form of a task's inputs; a text, unless it is one of `FORMS`."""
    return FORMS.get(task, (Field("text"),))


def main_of(form: Form) -> Field:
    """The field that an argument or a line of text stands for."""
    return next(field for field in form if "text" in (field.name, *field.others))
