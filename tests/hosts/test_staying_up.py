"""A server on three hosts is struck under load, by the lab's trial with few strikes: no token is lost, and in the end
nothing is left on any host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fullpipe.hub import cache
from fullpipe_lab.studies.serving import host_kills

pytestmark = pytest.mark.usefixtures("ray_can_be_started")


@pytest.mark.weights
def test_no_token_is_lost_with_a_station_or_a_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (cache.home() / "models").exists():
        pytest.skip("no models here: `fullpipe pull smollm2-135m`")
    receipt = tmp_path / "receipt.json"
    with pytest.raises(SystemExit) as ended:
        host_kills.main(["--strikes", "2", "--kinds", "kill,host", "--early", "0", "--clients", "2", "--requests", "4",
                         "--ends", "SIGKILL", "--out", str(receipt), "--log", str(tmp_path / "server.log")])
    assert ended.value.code == 0, capsys.readouterr()
    found = json.loads(receipt.read_text())["results"]
    assert found["faults"] == [] and found["struck_requests"] and found["different_or_failed"] == 0
