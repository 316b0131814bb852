"""The counters say what the requests' own statistics say, and what vLLM's would."""

from __future__ import annotations

import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fullpipe.engine import Engine, RequestStats
from fullpipe.events import Admitted, Asked, Attached, Died, Emitted, Fate, Finished, Launched, Preempted, Submitted
from fullpipe.messages import Drafted, Event, Landed, Leg
from fullpipe.methods import make_method
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.request import Request, SamplingParams
from fullpipe.server.metrics import Metrics
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe.stations.scripted import ScriptedStage
from fullpipe.supervision import Status
from fullpipe.trace.flying import Flying
from recorded import PROMPTS, TRUTH, uneven

MODEL = "a \"b\"\\c"  # labels are escaped
CALM = Status("ready", running=2, waiting=3, kv_used=25, kv_total=100, restarts=0)


def read(metrics: Metrics, status: Status = CALM) -> dict[str, float]:
    """Samples by name; labels other than the model's stand behind it, as in `name{le=1.0}`."""
    found = {}
    for family in text_string_to_metric_families(metrics.render(status)[0].decode()):
        for sample in family.samples:
            ours = family.name.startswith(("fullpipe_", "vllm:"))  # the others are those of the process
            assert not ours or sample.labels["model_name"] == MODEL
            rest = ",".join(f"{key}={value}" for key, value in sample.labels.items()
                            if key not in ("model_name", "engine"))
            found[sample.name + (f"{{{rest}}}" if rest else "")] = sample.value
    return found


def tell(metrics: Metrics, *events: Event) -> None:
    """What an engine would tell: its own count first."""
    for event in events:
        metrics._stats(event)
        metrics(event)


def submitted(time: float, request: int) -> Submitted:
    return Submitted(time, request, 3, time)


def token(time: float, request: int, node: int, fate: Fate = "hit") -> Emitted:
    return Emitted(time, request, node, 1, 1, fate)


def run(metrics: Metrics, requests: int = 2) -> list[RequestStats]:
    """A run of scripted stations."""
    pipeline = InProcessPipeline([ScriptedStage(k, 4, TRUTH) for k in range(4)],
                                 ScriptedDraft(TRUTH, accuracy=0.6, coverage=0.75), costs=uneven)
    engine = Engine(pipeline, make_method("fullpipe", width=4), listeners=[metrics])
    metrics.on_start(engine.stats)
    stats = []
    for id in range(requests):
        engine.submit(Request(id, PROMPTS[id], SamplingParams(max_tokens=20 + id)))
        stats.append(engine.stats.of(id))
    while engine.busy:
        engine.step()
    engine.drain()
    return stats


def test_totals_are_the_sums_of_the_requests_statistics() -> None:
    metrics = Metrics(MODEL)
    stats = run(metrics)
    told = read(metrics)
    hits, misses = (sum(getattr(one, name) for one in stats) for name in ("hits", "misses"))
    assert hits > 5 and misses > 2
    assert told["fullpipe_hits_total"] == told["fullpipe_spec_decode_num_accepted_tokens_total"] == hits
    assert told["fullpipe_misses_total"] == told["fullpipe_spec_decode_num_drafts_total"] == misses
    assert told["fullpipe_hit_ratio"] == pytest.approx(hits / (hits + misses))
    assert told["fullpipe_mean_acceptance_length"] == pytest.approx(1 + hits / misses)
    assert told["fullpipe_generation_tokens_total"] == sum(one.num_emitted for one in stats) == 41
    assert told["fullpipe_launched_rows_total"] == sum(one.launched_rows for one in stats)
    assert told["fullpipe_wasted_rows_total"] == sum(one.wasted_rows for one in stats)
    assert told["fullpipe_draft_rows_total"] == sum(one.draft_rows for one in stats)
    assert told["fullpipe_prompt_tokens_total"] == told["fullpipe_prefix_cache_queries_total"] == 6
    assert told["fullpipe_prefix_cache_hits_total"] == 0
    assert told["fullpipe_request_success_total{finished_reason=length}"] == 2
    assert told["fullpipe_request_success_total{finished_reason=error}"] == 0
    assert told["fullpipe_time_to_first_token_seconds_sum"] == pytest.approx(sum(one.ttft_s for one in stats))
    assert told["fullpipe_inter_token_latency_seconds_count"] == 39
    assert told["fullpipe_inter_token_latency_seconds_sum"] == pytest.approx(
        sum(one.tbt_s * (one.num_emitted - 1) for one in stats))
    assert told["fullpipe_request_decode_time_seconds_sum"] == pytest.approx(
        told["fullpipe_inter_token_latency_seconds_sum"])


def test_guesses_are_rows_that_were_not_certain_when_launched() -> None:
    metrics = Metrics(MODEL)
    tell(metrics, submitted(0, 7), Launched(0, 0, [0], [-1], [1], [0], [7]),  # the last prompt token
         Launched(1, 1, [1, 2], [0, 0], [1, 2], [1, 1], [7, 7]),  # two guesses behind it
         Died(2, 7, [1, 2]), token(2, 7, 0, "miss"), Launched(2, 2, [3], [-1], [9], [1], [7]),  # what was missed
         token(3, 7, 3, "last"), Finished(3, 7, "length"))
    told = read(metrics)
    assert told["fullpipe_spec_decode_num_draft_tokens_total"] == 2
    assert (told["fullpipe_launched_rows_total"], told["fullpipe_wasted_rows_total"]) == (4, 2)


def test_a_request_that_is_admitted_again_looks_up_its_prompt_once() -> None:
    metrics = Metrics(MODEL)
    tell(metrics, submitted(0, 7), Admitted(1, 7, 2), Preempted(2, 7), Admitted(3, 7, 1))
    told = read(metrics)
    assert (told["fullpipe_prefix_cache_queries_total"], told["fullpipe_prefix_cache_hits_total"]) == (3, 2)
    assert told["fullpipe_num_preemptions_total"] == 1


def test_stage_time_is_busy_or_bubble_and_alive_or_not() -> None:
    metrics = Metrics(MODEL)
    tell(metrics, submitted(10, 0), Launched(10, 0, [0, 1], [-1, 0], [1, 2], [0, 1], [0, 0]), Died(12.5, 0, [1]),
         Landed(14, 0, [0], [5], legs=[Leg("stage 0", 10, 12, [0, 1]), Leg("stage 1", 12, 14, [0, 1])]),
         token(14, 0, 0), Launched(14, 1, [2], [0], [5], [1], [0]),
         Landed(18, 1, [2], [5], legs=[Leg("stage 0", 14, 16, [2]), Leg("stage 1", 16, 18, [2])]),
         token(18, 0, 2, "last"), Finished(18, 0, "length"))
    tell(metrics, submitted(100, 1), Launched(100, 2, [3], [-1], [5], [1], [1]),  # between requests nothing idles
         Landed(104, 2, [3], [5], legs=[Leg("stage 0", 100, 101, [3]), Leg("stage 1", 101, 104, [3])]))
    told = read(metrics)
    assert told["fullpipe_stage_busy_seconds_total{station=stage 0}"] == 2 + 2 + 1
    assert told["fullpipe_stage_busy_seconds_total{station=stage 1}"] == 2 + 2 + 3
    assert told["fullpipe_stage_bubble_seconds_total{station=stage 0}"] == 2
    assert told["fullpipe_stage_bubble_seconds_total{station=stage 1}"] == 2 + 2 + 1
    assert told["fullpipe_stage_alive_seconds_total{station=stage 0}"] == 2 + 2 + 1
    assert told["fullpipe_stage_alive_seconds_total{station=stage 1}"] == 1 + 2 + 3  # half of its first stay
    assert told["fullpipe_fill_ratio"] == pytest.approx(11 / 19)
    assert told["fullpipe_flight_rows_sum"] == 2 + 1 + 1


def test_times_of_a_request() -> None:
    metrics = Metrics(MODEL)
    tell(metrics, Submitted(1.5, 0, 3, 1.0), Admitted(2.0, 0), Launched(2.5, 0, [0], [-1], [1], [0], [0]),
         token(5.0, 0, 0, "miss"), token(5.02, 0, 1), token(9.0, 0, 2, "last"), Finished(9.0, 0, "stop"))
    told = read(metrics)
    for name, seconds in (("time_to_first_token_seconds", 4), ("request_queue_time_seconds", 1),
                          ("request_prefill_time_seconds", 3), ("request_decode_time_seconds", 4),
                          ("e2e_request_latency_seconds", 8)):
        assert told[f"fullpipe_{name}_sum"] == seconds and told[f"fullpipe_{name}_count"] == 1, name
    buckets = {key: value for key, value in told.items() if key.startswith("fullpipe_inter_token_latency_seconds_b")}
    assert buckets["fullpipe_inter_token_latency_seconds_bucket{le=0.015}"] == 0
    assert buckets["fullpipe_inter_token_latency_seconds_bucket{le=0.03}"] == 1
    assert buckets["fullpipe_inter_token_latency_seconds_bucket{le=+Inf}"] == 2
    assert list(buckets.values()) == sorted(buckets.values())
    assert (told["fullpipe_hits_total"], told["fullpipe_misses_total"]) == (1, 1)  # nothing was to follow the last


def test_another_pipeline_begins_empty_and_the_counts_go_on() -> None:
    metrics = Metrics(MODEL)
    tell(metrics, submitted(0, 0), Launched(0, 0, [0, 1], [-1, 0], [1, 2], [0, 1], [0, 0]), token(1, 0, 0))
    metrics.on_restart("stage 1", "died")
    tell(metrics, Attached(5), Launched(9, 1, [2], [-1], [2], [1], [0]),
         Landed(10, 1, [2], [5], legs=[Leg("stage 0", 9, 10, [2])]), token(10, 0, 2), Finished(10, 0, "length"))
    told = read(metrics)
    assert told["fullpipe_restarts_total{station=stage 1}"] == 1
    assert told["fullpipe_stage_alive_seconds_total{station=stage 0}"] == 1
    assert told["fullpipe_inter_token_latency_seconds_sum"] == 9  # the user waited
    assert told["fullpipe_wasted_rows_total"] == 1


def test_state_and_service_counters() -> None:
    metrics = Metrics(MODEL)
    metrics.on_engine_time(0.25)
    metrics.on_engine_time(0.5)
    tell(metrics, submitted(0, 7), Asked(1, 0, {7: 3}), Drafted(3, 0, [], Leg("draft", 1, 3, [1, 2, -1])))
    told = read(metrics, Status("rebuilding", 2, 3, 25, 100, 1))
    assert told["fullpipe_engine_seconds_total"] == 0.75
    assert told["fullpipe_kv_cache_usage_perc"] == 0.25
    assert (told["fullpipe_num_requests_running"], told["fullpipe_num_requests_waiting"]) == (2, 3)
    assert told["fullpipe_state{state=rebuilding}"] == 1 and told["fullpipe_state{state=ready}"] == 0
    assert [told[f"fullpipe_draft_{what}_total"] for what in ("jobs", "rows", "seconds")] == [1, 3, 2]
    assert read(metrics, Status("ready", 0, 0, 0, 0, 0))["fullpipe_kv_cache_usage_perc"] == 0


def test_vllm_names_are_told_on_request_and_say_the_same() -> None:
    plain, both = Metrics(MODEL, vllm_names=False), Metrics(MODEL)
    assert not any(name.startswith("vllm:") for name in read(plain))
    run(both)
    told = read(both)
    theirs = {name.removeprefix("vllm:"): value for name, value in told.items() if name.startswith("vllm:")}
    assert {"time_to_first_token_seconds_sum", "inter_token_latency_seconds_count", "kv_cache_usage_perc",
            "request_success_total{finished_reason=stop}", "num_requests_running", "prompt_tokens_total",
            "spec_decode_num_accepted_tokens_total", "prefix_cache_hits_total"} <= set(theirs)
    assert theirs == {name: told["fullpipe_" + name] for name in theirs}


def test_nothing_is_kept_of_what_is_over() -> None:
    metrics = Metrics(MODEL)
    run(metrics)
    assert not metrics._lives and metrics._flying == Flying()
    metrics(token(1, 99, 5))  # a listener may have ended the request on this very event
    assert not metrics._lives


def test_it_may_be_read_while_it_counts() -> None:
    metrics = Metrics(MODEL)

    def count() -> None:
        for k in range(2000):
            tell(metrics, Launched(k, k, [], [], [], []))

    thread = threading.Thread(target=count)
    thread.start()
    seen = [read(metrics)["fullpipe_flights_total"] for _ in range(5)]
    thread.join()
    assert seen == sorted(seen) and read(metrics)["fullpipe_flights_total"] == 2000
