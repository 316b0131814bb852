"""Metrics against cases worked out by hand, and what must hold of them for any samples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_receipt import receipt, sample, whole_receipt

from fullpipe.errors import UsageError
from fullpipe_lab.metrics import (
    ALL,
    Estimate,
    Group,
    Key,
    Results,
    Summary,
    main_groups,
    pairs,
    speedup,
    summarise,
)
from fullpipe_lab.receipts import Sample

PP = [sample(), sample(prompt="set/1#0", tokens=20, tbt_s=2.0, decode_s=40.0, steps=40.0, misses=19, ttft_s=4.0)]
FAST = {"method": "fullpipe", "width": 4, "draft": "ngram", "floor": 0.01}
OURS = [
    sample(**FAST, decode_s=12.0, tbt_s=1.0, steps=12.0, hits=8, misses=1, restarts=1, launched_rows=40,
           wasted_rows=30, fill=0.8, bubbles=[0.0, 0.25], draft_busy=0.5, link_bytes=[4000.0],
           hits_by_depth=[1, 1, 1, 1, 4], asked_by_depth=[2, 1, 1, 1, 4], engine_s=0.006),
    sample(**FAST, prompt="set/1#0", tokens=20, decode_s=28.0, tbt_s=1.25, steps=28.0, hits=13, misses=6, restarts=2,
           launched_rows=60, wasted_rows=40, fill=0.6, bubbles=[0.2, 0.5], draft_busy=0.25, link_bytes=[6000.0, 90.0],
           hits_by_depth=[5, 8], asked_by_depth=[7, 12], engine_s=0.014, same_text=False, near_ties=1, ttft_s=3.0),
]


def group(samples: list[Sample]) -> Group:
    return {(one.prompt, one.repeat): one for one in samples}


def over(baseline: list[Sample], samples: list[Sample]) -> Estimate:
    found = speedup(group(baseline), group(samples))
    assert found is not None
    return found


def only(samples: list[Sample], **changes: object) -> Summary:
    found = summarise(receipt(samples, **changes))
    return found[Key("two", 0.0, samples[-1].method, ALL)]


def test_ratios_are_of_totals() -> None:
    one = only(OURS)
    assert (one.prompts, one.samples, one.tokens, one.decode_s) == (2, 2, 30, 40.0)
    assert one.s_per_token == 40 / 30
    assert one.tbt_s == pytest.approx((9 * 1.0 + 19 * 1.25) / 28)
    assert one.ttft_s == 2.5
    assert one.steps_per_token == pytest.approx(40 / 30)
    assert one.hit_rate == pytest.approx(21 / 28)
    assert one.mean_acceptance_length == 1 + 21 / 7
    assert one.waste == pytest.approx(70 / 30)
    assert one.engine_s_per_step == pytest.approx(0.020 / 40)
    assert (one.compared, one.same_texts, one.near_ties) == (2, 1, 1)


def test_a_replayed_text_was_not_compared() -> None:
    one = only([OURS[0].model_copy(update={"same_text": None, "near_ties": None}), OURS[1]])
    assert (one.samples, one.compared, one.same_texts, one.near_ties) == (2, 1, 0, 1)


def test_shares_are_weighted_by_time() -> None:
    one = only(OURS)
    assert one.fill == pytest.approx((12 * 0.8 + 28 * 0.6) / 40)
    assert one.draft_busy == pytest.approx((12 * 0.5 + 28 * 0.25) / 40)


def test_lists_of_other_lengths_are_added_place_by_place() -> None:
    one = only(OURS)
    assert one.bytes_per_token == pytest.approx([10000 / 30, 90 / 30])


def test_speedup_is_of_totals_and_paired() -> None:
    both = only(PP + OURS)
    # 9 and 19 gaps: 2 seconds each with pp, 1 and 1.25 with the method.
    assert both.over_pp is not None and both.over_pp.value == pytest.approx(56 / (9 * 1.0 + 19 * 1.25))
    low, high = both.over_pp.low, both.over_pp.high
    # With two prompts a resample is one of three: twice the first, both, twice the second.
    assert (low, high) == pytest.approx((2 / 1.25, 2 / 1))


def test_the_first_token_is_no_part_of_a_speedup() -> None:
    late = sample(**FAST, tbt_s=1.0, decode_s=1000.0, ttft_s=990.0)
    assert over([sample()], [late]).value == 2.0


def test_a_shorter_text_is_no_speedup() -> None:
    """A near-tie may end a text early; times between tokens are compared."""
    half = sample(**FAST, tokens=5, decode_s=10.0, same_text=False, near_ties=1)
    assert over([sample()], [half]).value == 1.0


def test_one_prompt_has_no_interval() -> None:
    found = over(PP[:1], OURS[:1])
    assert (found.low, found.high) == (None, None)


def test_repeats_of_a_prompt_are_one_prompt() -> None:
    found = over([sample(), sample(repeat=1)], [sample(**FAST, tbt_s=1.0), sample(**FAST, tbt_s=3.0, repeat=1)])
    assert (found.value, found.low) == (1.0, None)


def test_an_answer_of_one_token_is_left_out() -> None:
    one = {"prompt": "set/2#0", "tokens": 1, "tbt_s": 0.0, "decode_s": 2.0}
    with_it = group([*PP, sample(**one)]), group([*OURS, sample(**FAST | one)])
    assert pairs(*with_it) == pairs(group(PP), group(OURS))
    assert speedup(*with_it) == speedup(group(PP), group(OURS))


def test_where_one_of_the_two_said_one_token_there_is_no_pair() -> None:
    short = sample(**FAST, tokens=1, tbt_s=0.0, same_text=False, near_ties=1)
    assert pairs(group([sample()]), group([short])) == pairs(group([short]), group([sample()])) == {}
    alone = only([sample(), short])
    assert alone.over_pp is None and alone.tbt_s == 0.0


def test_tokens_that_land_together_have_no_ratio_of_their_own() -> None:
    together = [sample(**FAST, tokens=2, tbt_s=0.0), OURS[1]]
    plain = [sample(tokens=2), PP[1]]
    assert over(plain, together) == Estimate(pytest.approx(2 * 20 / 20 / (19 * 1.25 / 20)), None, None)
    assert speedup(group(plain[:1]), group(together[:1])) is None


def test_the_interval_is_the_same_each_time_and_narrows_with_prompts() -> None:
    def width(prompts: int) -> float:
        plain = [sample(prompt=f"s/{i}#0") for i in range(prompts)]
        ours = [sample(**FAST, prompt=f"s/{i}#0", tbt_s=0.4 + 0.1 * (i % 4)) for i in range(prompts)]
        first, second = (over(plain, ours) for _ in range(2))
        assert first == second and first.low is not None and first.high is not None
        assert first.low <= first.value <= first.high
        return first.high - first.low

    # Four times as many prompts, half the width.
    assert width(64) / width(16) == pytest.approx(0.5, rel=0.2)


times = st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.01, 100), st.integers(2, 50)), min_size=1, max_size=12)


@given(times, st.floats(0.1, 10))
def test_a_speedup_scales_with_time_and_lies_among_those_of_the_prompts(
    rows: list[tuple[float, float, int]], factor: float
) -> None:
    plain = [sample(prompt=f"s/{i}#0", tbt_s=a, tokens=n) for i, (a, _, n) in enumerate(rows)]
    ours = [sample(**FAST, prompt=f"s/{i}#0", tbt_s=b, tokens=n) for i, (_, b, n) in enumerate(rows)]
    slower = [sample(**FAST, prompt=f"s/{i}#0", tbt_s=b * factor, tokens=n) for i, (_, b, n) in enumerate(rows)]
    found, scaled = over(plain, ours), over(plain, slower)
    alone = [a / b for a, b, _ in rows]
    assert min(alone) * (1 - 1e-9) <= found.value <= max(alone) * (1 + 1e-9)
    assert scaled.value * factor == pytest.approx(found.value)
    assert over(ours, plain).value == pytest.approx(1 / found.value)
    if found.low is not None and found.high is not None:
        assert min(alone) * (1 - 1e-9) <= found.low <= found.high <= max(alone) * (1 + 1e-9)


# ---- what cannot be compared -----------------------------------------------------------------------------


def test_missing_pairs_are_named() -> None:
    with pytest.raises(UsageError, match=r"pp has no sample of set/1#0 \(repeat 0\)") as caught:
        summarise(receipt(PP[:1] + OURS))
    assert "on two at temperature 0" in caught.value.message
    with pytest.raises(UsageError, match=r"fullpipe has no sample of set/0#0 \(repeat 0\)"):
        summarise(receipt(PP + OURS[1:]))


def test_of_many_missing_pairs_a_few_are_named() -> None:
    many = [sample(prompt=f"set/{index}#0") for index in range(9)]
    with pytest.raises(UsageError, match=r"set/4#0 \(repeat 0\), set/5#0 \(repeat 0\) and 3 more"):
        summarise(receipt([*many, sample(**FAST)]))


def test_a_sample_twice_is_refused() -> None:
    with pytest.raises(UsageError, match=r"two samples of set/0#0, repeat 0, with pp on two at temperature 0"):
        summarise(receipt([sample(), sample()]))


def test_a_sample_without_time_is_refused() -> None:
    with pytest.raises(UsageError, match=r"10 tokens in 0 s"):
        summarise(receipt([sample(decode_s=0.0)]))


def test_tuning_alone_is_nothing_to_report() -> None:
    with pytest.raises(UsageError, match="no samples of phase 'main'"):
        summarise(receipt([sample(phase="tuning")]))


def test_tuning_samples_are_not_counted() -> None:
    assert only([*OURS, sample(**FAST, phase="tuning", decode_s=9999.0)]).decode_s == 40.0


# ---- order and lookup --------------------------------------------------------------------------------------


def test_groups_come_in_the_order_of_the_clusters_and_temperatures() -> None:
    whole = whole_receipt(stages=(3, 2), prompts=1, tokens=8)
    shuffled = whole.model_copy(update={"samples": whole.samples[::-1]})
    assert [key[:2] for key in dict.fromkeys((c, t) for c, t, _ in main_groups(shuffled))] == [
        ("gpus-3", 0.0), ("gpus-3", 1.0), ("gpus-2", 0.0), ("gpus-2", 1.0)]


def test_task_classes_are_apart_and_together() -> None:
    results = Results(whole_receipt(stages=(3,), prompts=2, tokens=8))
    assert results.tasks == [ALL, "humaneval", "gsm8k", "mt_bench"]
    overall = results.at("gpus-3", 0.0, "fullpipe")
    parts = [results.at("gpus-3", 0.0, "fullpipe", task) for task in results.tasks[1:]]
    assert overall is not None and overall.prompts == 6
    assert sum(part.decode_s for part in parts if part) == pytest.approx(overall.decode_s)
    assert results.at("gpus-3", 0.5, "fullpipe") is None
