"""The `openai` package, sync and async."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
from pydantic import BaseModel
from trial import Trials

trials = Trials()
client = openai.OpenAI(base_url=trials.base, api_key="none", max_retries=0, timeout=120)
ASK: dict[str, Any] = {"model": trials.model, "temperature": 0, "max_tokens": 24,
                       "messages": [{"role": "user", "content": "Name three colours."}]}
TOOL: Any = {"type": "function", "function": {
    "name": "get_weather", "description": "Tells the weather in a city.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
WEATHER = ASK | {"messages": [{"role": "user", "content": "What is the weather in Paris?"}], "max_tokens": 64}


class Person(BaseModel):
    name: str
    age: int


def check_call(calls: Any) -> None:
    assert len(calls) == 1 and calls[0].id and calls[0].function.name == "get_weather", calls
    assert isinstance(json.loads(calls[0].function.arguments)["city"], str), calls


with trials("models"):
    assert trials.model in [model.id for model in client.models.list()]
with trials("chat"):
    whole = client.chat.completions.create(**ASK)
    assert whole.choices[0].message.content and whole.usage and whole.usage.completion_tokens <= 24
with trials("chat, streamed"):
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
with trials("chat, log-probabilities"):
    told = client.chat.completions.create(**ASK, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert told and told.content and all(len(one.top_logprobs) == 2 for one in told.content)
with trials("completion"):
    done = client.completions.create(model=trials.model, prompt="One, two, three,", max_tokens=8, temperature=0)
    assert done.choices[0].text
with trials("completion, echo and log-probabilities"):
    scored = client.completions.create(model=trials.model, prompt="One, two, three,", max_tokens=0, echo=True,
                                       logprobs=1)
    found = scored.choices[0].logprobs
    assert scored.choices[0].text == "One, two, three," and found and found.token_logprobs
    assert found.token_logprobs[0] is None and all(one < 0 for one in found.token_logprobs[1:])
with trials("tools, required"):
    check_call(client.chat.completions.create(**WEATHER, tools=[TOOL], tool_choice="required")
               .choices[0].message.tool_calls)
with trials("tools, streamed"):
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    with client.chat.completions.stream(**WEATHER, tools=[TOOL], tool_choice=named) as stream:
        check_call(stream.get_final_completion().choices[0].message.tool_calls)
with trials("tools, the result is told"):
    made = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    calls = [{"id": "call_1", "type": "function", "function": made}]
    talk = [*WEATHER["messages"], {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "call_1", "content": "Rain, 12 degrees."}]
    assert client.chat.completions.create(**WEATHER | {"messages": talk}, tools=[TOOL],
                                          tool_choice="none").choices[0].message.content
with trials("structure: a schema"):
    asked = ASK | {"messages": [{"role": "user", "content": "Who is Ada, 36 years old? Answer as JSON."}],
                   "max_tokens": 96}
    parsed = client.chat.completions.parse(**asked, response_format=Person).choices[0].message.parsed
    assert isinstance(parsed, Person)
with trials("structure: any JSON"):
    said = client.chat.completions.create(**asked, response_format={"type": "json_object"}).choices[0]
    assert said.finish_reason == "length" or isinstance(json.loads(said.message.content or ""), dict)
with trials("structure: a choice"):
    extra = {"structured_outputs": {"choice": ["red", "green"]}}
    assert client.chat.completions.create(**ASK, extra_body=extra).choices[0].message.content in ("red", "green")
with trials("responses"):
    response = client.responses.create(model=trials.model, input="Name three colours.", max_output_tokens=24,
                                       temperature=0)
    assert response.output_text and response.usage and response.usage.output_tokens <= 24
with trials("responses, streamed"):
    pieces = ""
    for event in client.responses.create(model=trials.model, input="Name three colours.", max_output_tokens=24,
                                         temperature=0, stream=True):
        pieces += event.delta if event.type == "response.output_text.delta" else ""
    assert pieces == response.output_text
with trials("an error"):
    try:
        client.chat.completions.create(**ASK, top_p=2)
        raise AssertionError("it was not refused")
    except openai.BadRequestError as error:
        assert error.param == "top_p", error


async def several() -> None:
    async with openai.AsyncOpenAI(base_url=trials.base, api_key="none", max_retries=0, timeout=120) as other:
        answers = await asyncio.gather(*(other.chat.completions.create(**ASK) for _ in range(4)))
        assert {answer.choices[0].message.content for answer in answers} == {whole.choices[0].message.content}
        text = ""
        async for chunk in await other.chat.completions.create(**ASK, stream=True):
            text += chunk.choices[0].delta.content or ""
        assert text == whole.choices[0].message.content


with trials("async, four at once say the same"):
    asyncio.run(several())
trials.end()
