"""What users may ask for, and what they are told when they may not."""

import math

import pytest
from msgspec import msgpack

from fullpipe.errors import FullpipeError, PromptError, UsageError
from fullpipe.request import Request, SamplingParams, Structured, fitted


def test_params_travel_as_they_are() -> None:
    params = SamplingParams(temperature=0.7, stop="end", logit_bias={3: -math.inf}, stop_token_ids=[5],  # type: ignore
                            seed=2**64 - 1)
    assert msgpack.decode(msgpack.encode(params), type=SamplingParams) == params
    assert params.stop == ("end",) and params.accept == "exact"
    held = SamplingParams(structured=Structured("json", "{}"), bad_words="no", bad_word_ids=((3, 4), (5,)),  # type: ignore
                          allowed_token_ids=[7, 7, 8], min_tokens=3)  # type: ignore[arg-type]
    assert msgpack.decode(msgpack.encode(held), type=SamplingParams) == held
    assert (held.bad_words, held.allowed_token_ids) == (("no",), (7, 8))
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
    ({"min_tokens": -1}, r"min_tokens must be in \[0, max_tokens\], here 128 \(got -1\)"),
    ({"min_tokens": 9, "max_tokens": 8}, r"min_tokens must be in \[0, max_tokens\], here 8 \(got 9\)"),
    ({"bad_words": ("a", " ")}, "bad_words must not be empty"),
    ({"bad_words": ("\ud800",)}, "bad_words must be text"),
    ({"allowed_token_ids": ()}, "allowed_token_ids must name at least one"),
    ({"structured": Structured("regex", "a"), "ignore_eos": True}, "which ignore_eos would pass over"),
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


@pytest.mark.parametrize(("kind", "text", "message"), [
    ("jsn", "{}", "cannot be structured by 'jsn'"), ("json", "", "json needs a text"),
    ("json_object", "{}", "json_object has no text"), ("regex", "\ud800", "must be text that UTF-8"),
])
def test_structures_that_are_none(kind: str, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        Structured(kind, text)  # type: ignore[arg-type]
    assert raised.value.param == "structured"


def fit(params: SamplingParams, length: int = 3, **more: object) -> SamplingParams:
    return fitted([1] * length, params, vocab=50, max_model_len=20, special={}, **more)  # type: ignore[arg-type]


def test_bad_words_become_tokens_with_a_space_before_and_without() -> None:
    """As in vLLM: with a space only where that is another word of as many tokens."""
    spelled = {"no": [5], " no": [6], "why": [7, 8], " why": [9], "same": [10, 11], " same": [10, 12], "two": [13, 14],
               " two": [15, 14]}
    params = fit(SamplingParams(bad_words=("no", " why", "same", "two")), encode=spelled.__getitem__)
    assert params.bad_word_ids == ((5,), (6,), (7, 8), (10, 11), (13, 14), (15, 14))
    assert fit(SamplingParams(bad_word_ids=((3,),))).bad_word_ids == ((3,),)


def test_the_least_number_of_tokens_is_cut_to_the_room_there_is() -> None:
    cut = fit(SamplingParams(min_tokens=100, max_tokens=100))
    assert (cut.min_tokens, cut.max_tokens) == (17, 17)


def test_allowed_tokens_must_exist_and_be_possible() -> None:
    assert fit(SamplingParams(allowed_token_ids=(3, 49))).allowed_token_ids == (3, 49)
    for params, message in ((SamplingParams(allowed_token_ids=(50,)), "token 50 is not in the vocabulary"),
                            (SamplingParams(allowed_token_ids=(4,), logit_bias={4: -math.inf}), "nothing to pick")):
        with pytest.raises(UsageError, match=message) as raised:
            fit(params)
        assert raised.value.param == "allowed_token_ids"


def test_end_tokens_are_told_where_they_matter() -> None:
    for params, told in ((SamplingParams(), []), (SamplingParams(min_tokens=1), [4, 7]),
                         (SamplingParams(structured=Structured("json_object")), [4, 7])):
        assert Request(0, (1,), params, frozenset({7, 4})).told_ends == told
