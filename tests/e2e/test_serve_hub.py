"""`llmserve serve ORG/NAME`: the model comes from a hub, and from the store when it is there."""

from __future__ import annotations

import os
from pathlib import Path

import httpx

from tests.e2e.real_server import default_model, real_server
from tests.unit.hub_stub import HubStub


def answer(url: str) -> tuple[str, str]:
    """The model's name and what it says."""
    body = {"model": "org/smol-GGUF", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    return name, httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]


def test_a_model_of_a_hub_is_served_and_then_needs_no_hub(tmp_path: Path) -> None:
    data = default_model().read_bytes()
    env = {**os.environ, "LLMSERVE_HOME": str(tmp_path / "home")}
    with HubStub() as hub:
        hub.add("org/smol-GGUF", {"smol.gguf": data})
        with real_server(tmp_path, model="org/smol-GGUF", env={**env, "HF_ENDPOINT": hub.url}) as server:
            first = answer(server.url)
            assert "download:" in server.log.read_text()
    assert first == ("org/smol-GGUF", first[1])
    assert "Paris" in first[1]
    with real_server(tmp_path, model="hf://org/smol-GGUF", env={**env, "LLMSERVE_OFFLINE": "1"}) as server:
        assert answer(server.url) == first
