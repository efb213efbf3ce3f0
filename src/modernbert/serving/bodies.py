"""What bodies of requests have in common: types are not converted, and schemas say what the models can read."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Body(BaseModel):
    """A request. Unknown keys are ignored, as clients send keys of other servers."""

    model_config = ConfigDict(strict=True)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]  # JSON has one kind of number
# The library says itself, in its own words, that a text is empty; the schema tells programs before they ask.
Text = Annotated[str, Field(json_schema_extra={"minLength": 1, "pattern": r"\S"})]
Texts = Text | Annotated[list[Text], Field(json_schema_extra={"minItems": 1})]
Pair = Annotated[list[Text], Field(json_schema_extra={"minItems": 1, "maxItems": 2})]  # or a text alone
Id = Annotated[Whole, Field(ge=0)]
Ids = Annotated[list[Id], Field(json_schema_extra={"minItems": 1})]
TextsOrIds = Texts | Ids | Annotated[list[Ids], Field(json_schema_extra={"minItems": 1})]


def example(**values: Any) -> ConfigDict:
    """Configuration of a body with an example."""
    return ConfigDict(strict=True, json_schema_extra={"examples": [values]})
