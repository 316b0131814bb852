"""What the form of an answer may be: the fields that ask for JSON and its kin, and those that offer tools."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from fullpipe.server.protocol.wire import MAX_ENTRIES, Wire, boolean, measured

MAX_TOOLS = 128
MAX_CHOICE_TEXTS = 1024

Object = Annotated[dict[str, Any], Field(max_length=MAX_ENTRIES), BeforeValidator(measured)]
Pattern = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Annotated[str, Field(min_length=1)]],
                  Field(min_length=1, max_length=MAX_CHOICE_TEXTS, fail_fast=True)]
_Off = Annotated[Literal[False], BeforeValidator(boolean)]
_Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,256}$")]


class TextFormat(Wire):
    type: Literal["text"]


class JsonFormat(Wire):
    """Asks for any object."""

    type: Literal["json_object"]


_RIGHT = '{"type": "json_schema", "json_schema": {"name": "answer", "schema": {...}}}'


class JsonSchema(Wire):
    """Says of which schema. Whether `strict` or not, the text keeps to it."""

    name: str | None = None
    description: str | None = None
    schema_: Object = Field(alias="schema")
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_no_schema(cls, data: Any) -> Any:
        """What is a schema itself stands one place too high."""
        if isinstance(data, dict) and "schema" not in data and data.keys() & {"type", "properties", "$ref", "anyOf"}:
            raise PydanticCustomError("schema_place", "the schema belongs under \"schema\" in it, as in {right}",
                                      {"right": _RIGHT})
        return data


class SchemaFormat(Wire):
    type: Literal["json_schema"]
    json_schema: JsonSchema

    @model_validator(mode="before")
    @classmethod
    def _has_no_schema_beside(cls, data: Any) -> Any:
        if isinstance(data, dict) and "schema" in data and "json_schema" not in data:
            raise PydanticCustomError("schema_place", "the schema belongs under \"json_schema\", as in {right}",
                                      {"right": _RIGHT})
        return data


Format = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Wire):
    """Asks for one of these, as with vLLM."""

    json_: str | Object | None = Field(None, alias="json")
    regex: Pattern | None = None
    choice: Texts | None = None
    grammar: Pattern | None = None
    json_object: bool | None = None
    # not supported
    disable_any_whitespace: _Off | None = None
    disable_fallback: _Off | None = None
    disable_additional_properties: _Off | None = None
    whitespace_pattern: _Off | None = None
    structural_tag: _Off | None = None


class Function(Wire):
    """Describes a function. Its arguments keep to the schema, `strict` or not, where a call is demanded."""

    name: _Name
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None


class Tool(Wire):
    type: Literal["function"]
    function: Function

    @model_validator(mode="before")
    @classmethod
    def _holds_a_function(cls, data: Any) -> Any:
        """What is a function itself stands one place too high, as the Responses API has it."""
        if isinstance(data, dict) and "name" in data and "function" not in data:
            raise PydanticCustomError("tool_form", "its name and parameters belong under \"function\", as in {form}",
                                      {"form": '{"type": "function", "function": {"name": "f", "parameters": {...}}}'})
        return data

    def plain(self) -> dict[str, Any]:
        """As chat templates are told of it, without what is only for the server."""
        said = {"name": self.function.name, "description": self.function.description,
                "parameters": self.function.parameters}
        return {"type": "function", "function": {key: value for key, value in said.items() if value is not None}}


class FunctionName(Wire):
    name: str


class NamedTool(Wire):
    type: Literal["function"]
    function: FunctionName


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool
