"""LiteLLM, as an OpenAI-compatible server and as vLLM's."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it is fetched
import litellm
from trial import Trials

trials = Trials()
TALK = [{"role": "user", "content": "Name three colours."}]
TOOL = {"type": "function", "function": {
    "name": "get_weather", "description": "Tells the weather in a city.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": {
    "type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"], "additionalProperties": False}}}


def asked(provider: str, **more: Any) -> dict[str, Any]:
    return {"model": f"{provider}/{trials.model}", "api_base": trials.base, "api_key": "none", "temperature": 0,
            "max_tokens": 64, "num_retries": 0, "timeout": 120, "messages": TALK, **more}


for provider in ("openai", "hosted_vllm"):
    with trials(f"{provider}: chat"):
        whole = litellm.completion(**asked(provider))
        assert whole.choices[0].message.content and whole.usage.completion_tokens > 0
    with trials(f"{provider}: chat, streamed"):
        chunks = list(litellm.completion(**asked(provider, stream=True, stream_options={"include_usage": True})))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
    with trials(f"{provider}: tools"):
        call = litellm.completion(**asked(provider, tools=[TOOL], tool_choice="required", messages=[
            {"role": "user", "content": "What is the weather in Paris?"}])).choices[0].message.tool_calls[0]
        assert call.function.name == "get_weather" and json.loads(call.function.arguments)["city"]
    with trials(f"{provider}: a schema"):
        said = litellm.completion(**asked(provider, response_format=SCHEMA)).choices[0].message.content
        assert set(json.loads(said)) == {"name", "age"}
with trials("text_completion"):
    done = litellm.text_completion(model=f"text-completion-openai/{trials.model}", api_base=trials.base,
                                   api_key="none", prompt="One, two, three,", max_tokens=8, temperature=0)
    assert done.choices[0].text
with trials("acompletion, four at once say the same"):
    async def several() -> list[Any]:
        return await asyncio.gather(*(litellm.acompletion(**asked("openai")) for _ in range(4)))

    assert len({answer.choices[0].message.content for answer in asyncio.run(several())}) == 1
with trials("responses"):
    response = litellm.responses(model=f"openai/{trials.model}", api_base=trials.base, api_key="none",
                                 input="Name three colours.", max_output_tokens=24)
    assert response.output
trials.end()
