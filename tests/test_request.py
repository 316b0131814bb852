"""What users may ask for, and what they are told when they may not."""

import math

import pytest
from msgspec import msgpack

from fullpipe.errors import FullpipeError, PromptError, UsageError
from fullpipe.request import Request, SamplingParams


def test_params_travel_as_they_are() -> None:
    params = SamplingParams(temperature=0.7, stop="end", logit_bias={3: -math.inf}, stop_token_ids=[5],  # type: ignore
                            seed=2**64 - 1)
    assert msgpack.decode(msgpack.encode(params), type=SamplingParams) == params
    assert params.stop == ("end",) and params.accept == "exact"
    lossy = SamplingParams(accept_typical=0.3)
    assert msgpack.decode(msgpack.encode(lossy), type=SamplingParams) == lossy and lossy.accept == "typical:0.3"


@pytest.mark.parametrize(("values", "message"), [
    ({"temperature": -1}, r"temperature must be 0 or more \(got -1\)"),
    ({"temperature": float("nan")}, "temperature must be 0 or more"),
    ({"top_p": 0}, r"top_p must be in \(0, 1\] \(got 0\)"),
    ({"min_p": 2}, "min_p must be"),
    ({"top_k": -2}, "top_k must be"),
    ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
    ({"max_tokens": 0}, "max_tokens must be 1 or more"),
    ({"seed": -1}, "seed must be"),
    ({"stop": ("",)}, "stop strings must not be empty"),
    ({"accept_typical": -0.1}, r"accept_typical must be in \[0, 1\] \(got -0.1\)"),
    ({"accept_typical": 1.5}, "accept_typical must be in"),
    ({"accept_typical": float("nan")}, "accept_typical must be in"),
])
def test_values_out_of_range_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SamplingParams(**values)  # type: ignore[arg-type]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(TypeError):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(PromptError, match="the prompt is empty"):
        Request(0, (), SamplingParams())
    assert issubclass(PromptError, ValueError) and issubclass(UsageError, FullpipeError)
