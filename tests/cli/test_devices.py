"""A device that somebody names finds its way to the stations, or an error comes before anything is read."""

from __future__ import annotations

import pytest
import torch
from command import Models

from fullpipe.assembly import prepare
from fullpipe.errors import UsageError
from fullpipe.options import Options
from fullpipe.pipeline.links import Links
from fullpipe.pipeline.starting import Layout
from fullpipe.stations.spec import StationSpec


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.mark.usefixtures("one_gpu")
def test_stages_and_draft_model_are_told_of_the_device(models: Models) -> None:
    prepared = prepare(Options.of(model=str(models.target), draft=f"{models.draft},ngram", stages=2, device="cuda",
                                  kv_pool_mib=64))
    assert prepared.target.dtype == "bfloat16" and prepared.row_bytes == 2 * prepared.target.config.hidden
    assert [(spec.args["device"], spec.args["kv_pool_mib"]) for spec in prepared.stages] == [("cuda:0", 64)] * 2
    assert prepared.draft is not None
    drafts = prepared.draft.args["drafts"]
    assert [draft["args"].get("device") for draft in drafts] == ["cuda:0", None]


def test_on_the_processor_nobody_is_told_anything(models: Models) -> None:
    prepared = prepare(Options.of(model=str(models.target), draft="ngram", stages=2))
    assert not any({"device", "kv_pool_mib"} & set(spec.args) for spec in prepared.stages)


def test_a_gpu_that_is_not_there_is_told_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match="there is no device cuda") as told:
        prepare(Options.of(model="no such model", device="cuda"))
    assert told.value.param == "device"


@pytest.mark.parametrize(("values", "said"), [
    ({"device": "gpu"}, "unknown device 'gpu'"),
    ({"device": "cuda:"}, "unknown device 'cuda:'"),
    ({"device": "cuda", "kv_pool_mib": 0}, "kv_pool_mib must be 1 or more"),
], ids=lambda value: str(value))
def test_options_that_cannot_be(values: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Options.of(**values)


def test_stages_of_one_gpu_share_a_device() -> None:
    def spec(**args: object) -> StationSpec:
        return StationSpec("fullpipe.stations.target:build_stage", args)

    def devices(draft: StationSpec | None, *stages: StationSpec) -> list[str]:
        return Layout(stages=stages, draft=draft, links=Links([]), pace={}, threads=1, beat_s=1.0, silence_s=1.0,
                      start_timeout=1.0).devices

    assert devices(spec(), spec(), spec()) == ["core of stage 0", "core of stage 1", "core of draft"]
    assert devices(None, spec(device="cuda:0"), spec(device="cuda:0")) == ["cuda:0", "cuda:0"]
    assert devices(spec(device="cuda:1"), spec(device="cuda:0"), spec()) == ["cuda:0", "core of stage 1", "cuda:1"]


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(("draft", "device"), [("{draft},ngram", "cuda:0"), ("ngram,{draft}", "cuda:0"),
                                               ("ngram", "core of draft")])
def test_a_draft_model_beside_another_draft_shares_the_gpu_too(models: Models, draft: str, device: str) -> None:
    prepared = prepare(Options.of(model=str(models.target), draft=draft.format(draft=models.draft), stages=2,
                                  device="cuda"))
    layout = Layout(stages=prepared.stages, draft=prepared.draft, links=Links([]), pace={}, threads=1, beat_s=1.0,
                    silence_s=1.0, start_timeout=1.0)
    assert layout.devices == ["cuda:0", "cuda:0", device]
