"""How a model's authors want it sampled, read from their files as vLLM and llama.cpp read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import GenerationConfig

from fullpipe.errors import DamagedModel, UsageError
from fullpipe.models.generation import _GGUF, _GGUF_UNHEARD, _HF, _HF_UNHEARD, sampling_of
from fullpipe.request import SamplingParams
from tiny import tiny_model, write_gguf

QWEN = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05,
        "eos_token_id": [2, 3], "transformers_version": "4.51.0"}
READ = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}


def folder(path: Path, values: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "generation_config.json").write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(("values", "params"), [
    (QWEN, READ), ({}, {}), ({"eos_token_id": 2}, {}), ({"temperature": None, "top_p": 0.9}, {"top_p": 0.9}),
    ({"min_p": 0.1, "max_new_tokens": 7}, {"min_p": 0.1, "max_tokens": 7}), ({"temperature": 0}, {"temperature": 0}),
    ({"do_sample": True, "top_k": 5}, {"top_k": 5, "temperature": 1.0}),
    (QWEN | {"do_sample": False, "max_new_tokens": 7}, {"repetition_penalty": 1.05, "max_tokens": 7})])
def test_what_counts(tmp_path: Path, values: dict[str, Any], params: dict[str, Any]) -> None:
    found = sampling_of(folder(tmp_path, values))
    assert found.params == params and not found.unheard
    SamplingParams(**found.params)


def test_whose_it_is(tmp_path: Path) -> None:
    model, other = folder(tmp_path / "model", QWEN), folder(tmp_path / "other", {"top_k": 3})
    assert sampling_of(model, "none") == sampling_of(model, "vllm") == sampling_of(tmp_path)
    assert sampling_of(model, str(other)).params == {"top_k": 3}
    with pytest.raises(UsageError, match=r"no generation_config\.json in .*nowhere") as caught:
        sampling_of(model, str(tmp_path / "nowhere"))
    assert "auto, none" in str(caught.value.hint)


@pytest.mark.parametrize(("values", "named"), [
    ({"temperature": "hot"}, "temperature must be a number .got 'hot'"),
    ({"top_k": 2.5}, "top_k must be a whole number"),
    ({"top_p": 7}, r"top_p must be in \(0, 1\] \(got 7\)"), ({"temperature": -1}, "temperature must be 0 or more"),
    ({"max_new_tokens": True}, "max_tokens"), ([], "no JSON object")])
def test_a_value_that_cannot_be(tmp_path: Path, values: Any, named: str) -> None:
    with pytest.raises(DamagedModel, match=named) as caught:
        sampling_of(folder(tmp_path, values))
    assert str(tmp_path / "generation_config.json") in caught.value.message
    assert "`generation_config=none`" in str(caught.value.hint)


def test_what_is_in_force_is_told_and_what_is_not_done_is_too(tmp_path: Path) -> None:
    told = sampling_of(folder(tmp_path, QWEN | {"num_beams": 4, "no_repeat_ngram_size": 0})).told()
    assert told == [
        "sampling where a request says nothing, from generation_config.json: temperature 0.7, top_k 20, top_p 0.8, "
        "repetition_penalty 1.05 (`generation_config=none` leaves it aside)",
        "warning: generation_config.json also asks for num_beams, which is not done"]
    assert sampling_of(folder(tmp_path, {})).told() == []
    assert str(sampling_of(folder(tmp_path, {"max_new_tokens": 1048576, "top_p": 0.95}))) == (
        "top_p 0.95, max_tokens 1048576")
    assert sampling_of(folder(tmp_path, {"stop_strings": ["###"], "encoder_repetition_penalty": 1.2})).unheard == (
        "stop_strings", "encoder_repetition_penalty")


# Of how it is computed, of lengths that vLLM does not read either, and of what is no text.
ELSEWHERE = {
    "_from_model_config", "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight",
    "assistant_lookbehind", "bos_token_id", "cache_config", "cache_implementation", "compile_config",
    "continuous_batching_config", "decoder_start_token_id", "disable_compile", "do_sample", "eos_token_id",
    "is_assistant", "low_memory", "max_cache_len", "max_length", "max_matching_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_logits", "output_scores", "pad_token_id", "prefill_chunk_size", "prompt_lookup_num_tokens",
    "return_dict_in_generate", "speculation_type", "target_lookbehind", "transformers_version", "use_cache", "use_mtp",
    # of beams, which num_beams tells of; and of numbers that are not finite, which are an error here
    "early_stopping", "length_penalty", "num_beam_groups", "remove_invalid_values", "renormalize_logits",
}


def test_every_key_of_transformers_is_known() -> None:
    assert vars(GenerationConfig()).keys() - _HF.keys() - _HF_UNHEARD.keys() <= ELSEWHERE


def test_the_sampling_keys_of_a_gguf_file(tmp_path: Path) -> None:
    keys = {"temp": 0.7, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "penalty_repeat": 1.1, "penalty_last_n": 64}
    path = write_gguf(tiny_model("qwen2"), tmp_path / "m.gguf",
                      metadata={f"general.sampling.{key}": value for key, value in keys.items()})
    found = sampling_of(path)
    assert found.params == {"temperature": 0.7, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1}
    assert (found.source, found.unheard) == ("m.gguf", ("penalty_last_n",))


def test_every_sampling_key_of_gguf_is_known() -> None:
    """The order of samplers is ours; what mirostat and xtc are tuned with matters where they are on."""
    known = {f"general.sampling.{key}" for key in (*_GGUF, *_GGUF_UNHEARD, "sequence", "mirostat_tau", "mirostat_eta",
                                                   "xtc_threshold")}
    named = {value for name, value in vars(gguf.Keys.General).items() if name.startswith("SAMPLING_")}
    assert named == known
