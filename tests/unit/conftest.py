"""A hub on loopback and a store of its own, for the tests of pulls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.hub_stub import HubStub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    with HubStub() as stub:
        monkeypatch.setenv("LLMSERVE_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_ENDPOINT", stub.url + "/")
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "LLMSERVE_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("llmserve.checkpoints.download._BACKOFF_S", 0.001)
        yield stub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"
