"""LangChain (langchain-openai): chats, streams, tools, structured output."""

from __future__ import annotations

import asyncio

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field
from trial import Trials

trials = Trials()
model = ChatOpenAI(model=trials.model, base_url=trials.base, api_key="none", temperature=0, max_tokens=64,
                   max_retries=0, timeout=120)
TALK = [SystemMessage("Be brief."), HumanMessage("Name three colours.")]


@tool
def get_weather(city: str) -> str:
    """Tells the weather in a city."""
    return f"Rain in {city}."


class Person(BaseModel):
    """A person."""

    name: str = Field(description="The first name.")
    age: int


with trials("invoke"):
    whole = model.invoke(TALK)
    assert whole.content and whole.usage_metadata and whole.usage_metadata["output_tokens"] > 0
with trials("stream"):
    assert "".join(str(chunk.content) for chunk in model.stream(TALK)) == whole.content
with trials("batch"):
    assert all(answer.content for answer in model.batch([TALK, "Hi", [("user", "Hello")]]))
with trials("ainvoke"):
    assert asyncio.run(model.ainvoke(TALK)).content == whole.content
with trials("log-probabilities"):
    told = model.bind(logprobs=True, top_logprobs=2).invoke(TALK).response_metadata["logprobs"]["content"]
    assert told and len(told[0]["top_logprobs"]) == 2
with trials("bind_tools"):
    calling = model.bind_tools([get_weather], tool_choice="get_weather")
    (call,) = calling.invoke("What is the weather in Paris?").tool_calls
    assert call["name"] == "get_weather" and isinstance(call["args"]["city"], str)
with trials("bind_tools, streamed"):
    whole_call = None
    for chunk in calling.stream("What is the weather in Paris?"):
        whole_call = chunk if whole_call is None else whole_call + chunk
    assert whole_call.tool_calls[0]["args"] == call["args"]
with trials("bind_tools, the result is told"):
    talk = [HumanMessage("What is the weather in Paris?"), AIMessage("", tool_calls=[call]),
            ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])]
    assert model.invoke(talk).content
for method in ("json_schema", "function_calling"):
    with trials(f"with_structured_output, {method}"):
        found = model.with_structured_output(Person, method=method).invoke("Ada is 36 years old. Who is she?")
        assert isinstance(found, Person), found
with trials("with_structured_output, json_mode"):
    found = model.with_structured_output(Person, method="json_mode", include_raw=True).invoke(
        "Ada is 36 years old. Answer in JSON with name and age.")
    assert found["raw"].content.lstrip().startswith("{"), found
with trials("OpenAI (completions)"):
    plain = OpenAI(model=trials.model, base_url=trials.base, api_key="none", temperature=0, max_tokens=8, max_retries=0)
    assert plain.invoke("One, two, three,") and "".join(plain.stream("One, two, three,"))
with trials("responses"):
    over = ChatOpenAI(model=trials.model, base_url=trials.base, api_key="none", temperature=0, max_tokens=24,
                      use_responses_api=True, max_retries=0)
    assert over.invoke("Name three colours.").text
trials.end()
