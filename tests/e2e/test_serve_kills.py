"""The engine is killed again and again under load: the server answers again each time and keeps nothing of the dead."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.e2e.real_server import RealServer, children, events, real_server, stat_fields, wait_until_gone

pytestmark = [pytest.mark.model, pytest.mark.slow]
NUM_KILLS = 20
NUM_CLIENTS = 12
RESTART_S = 3.0
_BODY = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "stream": True}


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A runtime folder of its own, so that all in it is this server's. Sockets need a short path."""
    folder = Path(tempfile.mkdtemp(prefix="kills", dir="/tmp"))
    yield folder / "llmserve"
    shutil.rmtree(folder)


@dataclass(slots=True)
class Load:
    """Clients that ask for one long stream after the other."""

    client: httpx.AsyncClient
    num_tokens: Counter[int] = field(default_factory=Counter)
    """By client."""
    ends: Counter[str] = field(default_factory=Counter)
    """How streams ended: `done`, the code of their error event, or `cut`."""
    refusals: Counter[int] = field(default_factory=Counter)
    """Status codes of answers that were no streams."""

    async def run(self, number: int) -> None:
        while True:
            async with self.client.stream("POST", "/v1/completions", json=_BODY) as response:
                if response.status_code == 200:
                    self.ends[await self._read(number, response)] += 1
                    continue
                self.refusals[response.status_code] += 1
            await asyncio.sleep(0.02)

    async def _read(self, number: int, response: httpx.Response) -> str:
        end = "cut"
        async for event in events(response):
            assert end == "cut", "something follows the end"
            if event is None:
                end = "done"
            elif "error" in event:
                end = str(event["error"]["code"])
            else:
                self.num_tokens[number] += 1
        return end

    async def until_all_got(self, more: int, since: Counter[int]) -> None:
        await _until(lambda: all(self.num_tokens[number] >= since[number] + more for number in range(NUM_CLIENTS)))


async def _until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.002)


async def kill_under_load(server: RealServer) -> list[float]:
    """Kill the engine as often as said, each time with every client in a stream. Seconds without a token, each time."""
    limits = httpx.Limits(max_connections=NUM_CLIENTS)
    restarts_s = []
    pids = set()
    async with httpx.AsyncClient(base_url=server.url, timeout=30, limits=limits) as client:
        load = Load(client)
        clients = [asyncio.create_task(load.run(number)) for number in range(NUM_CLIENTS)]
        for kill in range(NUM_KILLS):
            await load.until_all_got(3, load.num_tokens.copy())
            pids.add(server.engine_pid)
            os.kill(server.engine_pid, signal.SIGKILL)
            killed_s = time.monotonic()
            await _until(lambda kill=kill: load.ends["engine_died"] >= (kill + 1) * NUM_CLIENTS)  # type: ignore[misc]
            num_before = load.num_tokens.total()
            await _until(lambda num_before=num_before: load.num_tokens.total() > num_before)  # type: ignore[misc]
            restarts_s.append(time.monotonic() - killed_s)
        await load.until_all_got(1, load.num_tokens.copy())
        for task in clients:
            task.cancel()
        outcomes = await asyncio.gather(*clients, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {asyncio.CancelledError}, outcomes
    assert len(pids) == NUM_KILLS
    assert set(load.ends) <= {"engine_died", "done"}, load.ends
    assert load.ends["engine_died"] == NUM_KILLS * NUM_CLIENTS
    assert set(load.refusals) <= {503}, load.refusals
    return restarts_s


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a server has of its machine."""

    num_children: int
    num_threads: int
    files: Counter[str]
    """Open ones by kind."""
    runtime: Counter[str]
    """Files of its runtime folder by suffix."""


def holdings(server: RealServer, runtime: Path) -> Holdings:
    pid = server.process.pid
    kinds: Counter[str] = Counter()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            kinds[os.readlink(fd).split(":")[0]] += 1
        except FileNotFoundError:
            continue
    return Holdings(
        num_children=len(children(pid)),
        num_threads=int(stat_fields(pid)[17]),
        files=kinds,
        runtime=Counter(path.suffix or path.name.split("-")[0] for path in runtime.rglob("*")),
    )


def settled(server: RealServer, runtime: Path, quiet_s: float = 0.5) -> Holdings:
    """What a server has once that stays the same for a while."""
    last, since = holdings(server, runtime), time.monotonic()
    while time.monotonic() < since + quiet_s:
        time.sleep(0.02)
        now = holdings(server, runtime)
        if now != last:
            last, since = now, time.monotonic()
    return last


def test_kills_under_load_leave_nothing_behind(tmp_path: Path, runtime: Path) -> None:
    with real_server(tmp_path, env=os.environ | {"XDG_RUNTIME_DIR": str(runtime.parent)}) as server:
        httpx.post(f"{server.url}/v1/completions", json=_BODY | {"max_tokens": 1, "stream": False}, timeout=30)
        before = settled(server, runtime)  # the connection of that request is closed when the server gets to it
        assert before.num_children == 1
        assert before.runtime == {"frontend": 1, "step": 1, ".in": 1, ".out": 1, ".progress": 1}
        restarts_s = asyncio.run(kill_under_load(server))
        assert max(restarts_s) < RESTART_S, [round(seconds, 2) for seconds in restarts_s]
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        end = time.monotonic() + 5.0
        while (after := holdings(server, runtime)) != before:
            assert time.monotonic() < end, f"{before} became {after}"
            time.sleep(0.05)
        assert server.metric("vllm:kv_cache_usage_perc") == 0
        engine_pid = server.engine_pid
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        wait_until_gone(engine_pid)
        assert [path.name for path in runtime.rglob("*")] == ["step-lease"]
