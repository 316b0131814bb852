"""`--kv-cache-dtype` on its way to the stations: who is told, what it is refused for, and what it saves."""

from __future__ import annotations

import pytest
from command import Models

from fullpipe.assembly import prepare
from fullpipe.assembly.costs import kept_costs
from fullpipe.errors import UsageError
from fullpipe.kernels import load
from fullpipe.llm import LLM
from fullpipe.models.slice import load_slice
from fullpipe.models.weights import open_model
from fullpipe.options import Options
from fullpipe.request import SamplingParams

pytestmark = pytest.mark.skipif(load() is None, reason="the native kernels were not built")

SHORT = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def test_every_method_says_the_same_with_a_cache_in_int8(models: Models) -> None:
    with LLM(str(models.target), draft=f"{models.draft},ngram", method="fullpipe", dtype="stored",
             kv_cache_dtype="int8", threads=1) as llm:
        ours = llm.generate("hello there", SHORT)[0]
        llm.use("pp")
        assert llm.generate("hello there", SHORT)[0].token_ids == ours.token_ids


def test_stages_and_draft_model_are_told_only_where_it_is_asked_for(models: Models) -> None:
    asked, not_asked = [prepare(Options.of(model=str(models.target), draft=str(models.draft), stages=2, dtype="stored",
                                           kv_cache_dtype=kind)) for kind in ("int8", "auto")]
    assert asked.draft is not None and not_asked.draft is not None
    assert {spec.args["kv_cache_dtype"] for spec in (*asked.stages, asked.draft)} == {"int8"}
    assert not any("kv_cache_dtype" in spec.args for spec in (*not_asked.stages, not_asked.draft))
    assert kept_costs(asked).path != kept_costs(not_asked).path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_for_the_native_kernels(models: Models, dtype: str) -> None:
    with pytest.raises(UsageError, match=f"in {dtype} on cpu") as told:
        prepare(Options.of(model=str(models.target), draft="none", dtype=dtype, kv_cache_dtype="float16"))
    assert told.value.param == "kv_cache_dtype" and "dtype=stored" in (told.value.hint or "")
    with pytest.raises(UsageError, match=f"in {dtype} on cuda:0"):
        load_slice(open_model(models.target), 0, 1, has_embedding=True, has_head=False, dtype=dtype, device="cuda:0",
                   kv_cache_dtype="int8")
    with pytest.raises(UsageError, match="unknown kv_cache_dtype 'fp8'"):
        Options.of(kv_cache_dtype="fp8")


def test_a_pool_has_as_many_slots_as_fit(models: Models) -> None:
    files = open_model(models.target)
    config = files.config
    size = -(-config.head_dim // 16) * 16
    for kind, head in (("auto", 2 * size), ("float16", 2 * size), ("float32", 4 * size), ("int8", size + 16)):
        part = load_slice(files, 0, 2, has_embedding=True, has_head=False, dtype="stored", kv_pool_mib=3,
                          kv_cache_dtype=kind)
        assert part.slots == (3 << 20) // (256 * 2 * 2 * config.kv_heads * head) * 256


def test_what_the_cache_takes_is_told(models: Models) -> None:
    """Of a million tokens, in MiB: 2 bytes a number, 4, or one and 16 beside each head."""
    told = [prepare(Options.of(model=str(models.target), draft="none", method="pp", dtype="stored",
                               kv_cache_dtype=kind)).cache_told(1 << 20) for kind in ("auto", "float32", "int8")]
    files = open_model(models.target)
    numbers = files.config.num_layers * 2 * files.config.kv_heads * files.config.head_dim
    heads = files.config.num_layers * 2 * files.config.kv_heads
    assert [f": {size:,} MiB over all stages" in line for size, line in zip(
        (2 * numbers, 4 * numbers, numbers + 16 * heads), told)] == [True] * 3
