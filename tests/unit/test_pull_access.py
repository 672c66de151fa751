"""What a hub refuses, where the token goes, and answers that no hub gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from llmserve.checkpoints import pull
from llmserve.errors import CheckpointError, ModelNotFound
from tests.unit.hub_stub import Fault, HubStub, nothing_is_there

GGUF = b"GGUF" + bytes(range(256)) * 40
CONFIG = b'{"model_type": "llama"}'


@pytest.mark.parametrize(
    ("token", "options", "error", "message"),
    [
        (
            "",
            {"token": "t", "gated": True},
            CheckpointError,
            r"is gated: accept its terms at http.*/org/tiny, then set HF_TOKEN",
        ),
        ("other", {"token": "t", "gated": True}, CheckpointError, "with the account of the token in HF_TOKEN"),
        ("", {"token": "t"}, ModelNotFound, r"has no repository org/tiny, or it is private: then set HF_TOKEN"),
        ("other", {"token": "t"}, ModelNotFound, "or the account of HF_TOKEN cannot see it"),
        ("bad", {}, CheckpointError, "does not accept the token in HF_TOKEN"),
    ],
)
def test_without_access(
    hub: HubStub,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    hub.add("org/tiny", {"m.gguf": GGUF}, **options)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(error, match=message) as caught:
        pull.resolve("hf://org/tiny")
    assert "\n" not in str(caught.value)


def test_what_does_not_exist(hub: HubStub) -> None:
    hub.add("org/tiny", {"m.gguf": GGUF})
    with pytest.raises(ModelNotFound, match=rf"^{re.escape(hub.url)} has no repository org/no, or it is private"):
        pull.resolve("hf://org/no")
    with pytest.raises(ModelNotFound, match=r"^org/no: no such file or folder, and http"):
        pull.resolve("org/no")
    with pytest.raises(ModelNotFound, match="org/tiny has no revision 'v9'"):
        pull.resolve("org/tiny@v9")


def test_other_refusals(hub: HubStub) -> None:
    hub.add("org/tiny", {"m.gguf": GGUF})
    message = {"X-Error-Message": "Access to this resource is disabled."}
    hub.fail(
        "api", "main", Fault(status=403, headers=message), Fault(status=418, headers={"X-Error-Message": "teapot"})
    )
    with pytest.raises(
        CheckpointError, match=r"may not be read: Access to this resource is disabled\.; then set HF_TOKEN"
    ):
        pull.resolve("org/tiny")
    with pytest.raises(CheckpointError, match="answered 418 teapot"):
        pull.resolve("org/tiny")
    hub.fail("api", "m.gguf", Fault(status=404, headers={"X-Error-Code": "EntryNotFound"}))
    with pytest.raises(ModelNotFound, match="has no such file: /org/tiny/resolve/"):
        pull.resolve("org/tiny")
    hub.fail("cdn", "", Fault(status=403))
    with pytest.raises(CheckpointError, match=r"org/tiny: 127\.0\.0\.1 answered 403"):
        pull.resolve("org/tiny")


def test_the_token_is_sent_to_the_hub_alone(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/tiny", {"config.json": CONFIG, "model.safetensors": b"S"}, token="secret")
    monkeypatch.setenv("HF_TOKEN", " secret\n")
    pull.resolve("org/tiny")
    sent = {
        one.host: {other.headers.get("Authorization") for other in hub.requests if other.host == one.host}
        for one in hub.requests
    }
    assert sent == {"api": {"Bearer secret"}, "cdn": {None}}


def test_a_redirect_to_plain_http_is_refused(hub: HubStub, home: Path) -> None:
    hub.add("org/tiny", {"m.gguf": GGUF})
    hub.fail("api", "m.gguf", Fault(status=302, headers={"Location": "http://192.0.2.1/m.gguf"}))
    with pytest.raises(CheckpointError, match=r"http://192\.0\.2\.1: plain http is accepted from this machine alone"):
        pull.resolve("org/tiny")
    nothing_is_there(home)


def test_a_repository_that_was_renamed(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("new/tiny", {"m.gguf": GGUF}, token="t")
    monkeypatch.setenv("HF_TOKEN", "t")
    hub.fail(
        "api", "revision/main", Fault(status=307, headers={"Location": "/api/models/new/tiny/revision/main?blobs=true"})
    )
    commit = hub.repositories["new/tiny"].branches["main"]
    hub.fail("api", "m.gguf", Fault(status=307, headers={"Location": f"/new/tiny/resolve/{commit}/m.gguf"}))
    assert pull.resolve("old/tiny").read_bytes() == GGUF


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>", "answered what no hub answers"),
        (b'{"sha": "main", "siblings": []}', "answered 'main' as the commit"),
        (
            b'{"sha": "'
            + b"a" * 40
            + b'", "siblings": [{"rfilename": "m.gguf", "lfs": {"sha256": "../x", "size": 1}}]}',
            "is none",
        ),
        (b'{"siblings": []}', "answered what no hub answers"),
    ],
)
def test_answers_that_no_hub_gives(hub: HubStub, home: Path, answer: bytes, message: str) -> None:
    hub.blobs["/answer"] = answer
    hub.fail("api", "main", Fault(status=307, headers={"Location": "/answer"}))
    with pytest.raises(CheckpointError, match=message):
        pull.resolve("org/tiny")
    nothing_is_there(home)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("HF_ENDPOINT", "http://hub.example", "write https://HOST"),
        ("HF_ENDPOINT", "hub.example", "write https://HOST"),
        ("HF_TOKEN", "tök", "characters that a token cannot have"),
        ("HF_TOKEN", "a\r\nb", "characters that a token cannot have"),
    ],
)
def test_bad_settings(hub: HubStub, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(CheckpointError, match=message):
        pull.resolve("org/tiny")
    assert hub.requests == []
