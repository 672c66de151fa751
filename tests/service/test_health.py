"""Readiness tells the truth."""

from __future__ import annotations

import time

import pytest

from llmserve.client.protocol import ClientState
from llmserve.service.health import Health
from llmserve.service.in_flight import InFlight
from tests.service.scripted import ScriptedClient, Server, says


def made(*, state: ClientState = "ready", busy: bool = True, quiet_s: float = 0.0) -> Health:
    client = ScriptedClient(says("a"))
    client.state, client.is_busy, client.last_progress_s = state, busy, time.monotonic() - quiet_s
    in_flight = InFlight()
    return Health(client, in_flight, progress_timeout_s=5.0)


def test_long_prefill_stays_ready() -> None:
    assert made(quiet_s=1.0).check().ready


def test_frozen_engine_is_not_ready() -> None:
    readiness = made(quiet_s=6.0).check()
    assert not readiness.ready
    assert "no progress" in readiness.reason


def test_idle_engine_is_ready_however_long_it_was_idle() -> None:
    assert made(busy=False, quiet_s=1000.0).check().ready


def test_idle_engine_that_does_not_answer_is_not_ready() -> None:
    server = Server(says("a"))
    assert server.get("/readyz").status_code == 200
    server.client.frozen = True
    server.model.health = Health(server.client, server.model.in_flight, progress_timeout_s=0.05)
    answer = server.get("/readyz")
    assert (answer.status_code, answer.json()["reason"]) == (503, "the idle engine did not answer within 0.05 s")


@pytest.mark.parametrize("state", ["starting", "restarting", "stopped"])
def test_other_states_are_not_ready(state: ClientState) -> None:
    assert not made(state=state).check().ready


def test_probes() -> None:
    server = Server(says("a"))
    assert server.get("/livez", start=False).status_code == 200
    loading = server.get("/readyz", start=False)
    assert (loading.status_code, loading.json()["reason"]) == (503, "the model is loading")
    assert server.get("/readyz").status_code == 200
    assert server.get("/health").status_code == 200
    server.model.in_flight.draining = True
    assert server.get("/readyz").status_code == 503
    assert server.complete().status_code == 503


def test_models() -> None:
    server = Server(says("a"))
    assert [card["id"] for card in server.get("/v1/models").json()["data"]] == ["made-model"]
    assert server.get("/v1/models/made-model").json()["max_model_len"] == 512
    assert server.get("/v1/models/other").status_code == 404
    assert server.get("/version").json()["version"]
