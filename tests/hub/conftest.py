"""A tiny model to fetch, and a cache folder of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import TinyModel, make_tiny


@pytest.fixture
def tiny(tmp_path: Path) -> TinyModel:
    return make_tiny(tmp_path / "wheels")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("FULLPIPE_HOME", str(folder))
    for variable in ("FULLPIPE_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    return folder
