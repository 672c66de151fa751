"""The engine child stays truthful while it computes: real processes, real signals, one step that takes long.

The long step is a real one: a network wide enough, run by the scalar kernels on one thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llmserve.client.process import ProcessClient
from llmserve.client.protocol import EngineClient
from llmserve.client.runtime_dir import FrontendFolder, runtime_dir
from llmserve.config import EngineConfig
from llmserve.errors import EngineDied, NotReady, Overloaded
from llmserve.service.health import Health
from llmserve.service.in_flight import InFlight
from llmserve.types import Request, SamplingParams
from tests.tiny.checkpoints import write
from tests.tiny.models import TinyModel

pytest.importorskip("llmserve._C", reason="the extension is not built")

NUM_TOKENS = 1536
TIMEOUT_S = 0.4
"""What counts as no progress here; a step takes several times as long."""


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A lease and a runtime folder of this test alone; its path is short, as those of sockets must be."""
    with tempfile.TemporaryDirectory(prefix="llmserve-") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    wide = TinyModel(name="wide", model_type="llama", hidden_size=512, intermediate_size=1536, num_layers=24,
                     num_heads=16, num_kv_heads=8)  # fmt: skip
    path = write(wide, tmp_path_factory.mktemp("wide"))
    shape = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": 2048}))
    return EngineConfig(model_path=path, max_num_batched_tokens=NUM_TOKENS, max_num_seqs=8, max_model_len=2048,
                        kv_cache_bytes=1 << 28, num_threads=1, exact=True, itl_target_ms=0.0)  # fmt: skip


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    path = write(TinyModel(name="tiny", model_type="llama"), tmp_path_factory.mktemp("tiny"))
    return EngineConfig(model_path=path, max_model_len=128, kv_cache_bytes=1 << 22, max_num_seqs=4)


def long_request(request_id: str, deadline_s: float | None = None) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=[1 + i % 150 for i in range(NUM_TOKENS)],
        sampling=SamplingParams(max_tokens=2),
        deadline_s=deadline_s,
    )


def short_request(request_id: str, max_tokens: int = 120) -> Request:
    return Request(request_id=request_id, prompt_token_ids=[1, 2], sampling=SamplingParams(max_tokens=max_tokens))


async def last_reason(client: EngineClient, request: Request) -> str | None:
    reason = None
    async with contextlib.aclosing(client.submit(request)) as stream:
        async for output in stream:
            reason = output.finish_reason
    return reason


@contextlib.asynccontextmanager
async def started(config: EngineConfig, *, slow: bool = False) -> AsyncIterator[ProcessClient]:
    client = ProcessClient(config)
    if slow:
        os.environ["LLMSERVE_CPU_ISA"] = "scalar"
    try:
        await client.start()
        yield client
    finally:
        os.environ.pop("LLMSERVE_CPU_ISA", None)
        await client.stop()


async def until(condition: object, timeout_s: float = 10.0) -> float:
    assert callable(condition)
    begin_s = time.monotonic()
    while not condition():
        assert time.monotonic() - begin_s < timeout_s, "it did not happen in time"
        await asyncio.sleep(0.002)
    return time.monotonic() - begin_s


def health_of(client: ProcessClient) -> Health:
    return Health(client, InFlight(), progress_timeout_s=TIMEOUT_S)


@pytest.mark.slow
def test_long_step_stays_ready_and_a_frozen_one_does_not(config: EngineConfig) -> None:
    async def run() -> None:
        async with started(config, slow=True) as client:
            health = health_of(client)
            stream = asyncio.create_task(last_reason(client, long_request("a")))
            await asyncio.sleep(0.1)
            for _ in range(20):  # five times the timeout, inside the first step
                assert (await health.probe()).ready
                await asyncio.sleep(5 * TIMEOUT_S / 20)
            assert client.stats.num_steps == 0, "the step was too short to prove anything"
            os.kill(client.pid or 0, signal.SIGSTOP)
            await asyncio.sleep(2 * TIMEOUT_S)
            assert not (await health.probe()).ready  # asked once, after it had been frozen
            os.kill(client.pid or 0, signal.SIGCONT)
            await until(lambda: health.check().ready)
            # A client that leaves ends the step it alone was waiting for.
            stream.cancel()
            assert await until(lambda: not client.is_busy) < 1.0
            assert client.stats.num_running == 0
            # So does a deadline; a request that comes meanwhile is served as ever.
            began_s = time.monotonic()
            assert await last_reason(client, long_request("b", began_s + 0.3)) == "deadline"
            assert time.monotonic() - began_s < 0.8
            assert await last_reason(client, short_request("c", 3)) == "length"
            assert await client.control("check_integrity") is not None

    asyncio.run(run())


def test_stop_does_not_wait_for_a_long_step(config: EngineConfig) -> None:
    async def run() -> float:
        async with started(config, slow=True) as client:
            task = asyncio.create_task(last_reason(client, long_request("a")))
            await asyncio.sleep(0.3)
            began_s = time.monotonic()
            await client.stop()
            assert await task == "abort"
            return time.monotonic() - began_s

    assert asyncio.run(run()) < 2.0


def test_frozen_idle_engine_is_found_out(quick: EngineConfig) -> None:
    async def run() -> None:
        async with started(quick) as client:
            health = health_of(client)
            assert (await health.probe()).ready
            os.kill(client.pid or 0, signal.SIGSTOP)
            assert not (await health.probe()).ready
            began_s = time.monotonic()
            assert await last_reason(client, replace_deadline(short_request("a"), began_s + 0.2)) == "deadline"
            assert time.monotonic() - began_s < 1.0, "a deadline holds whatever the engine does"
            os.kill(client.pid or 0, signal.SIGCONT)
            await until(lambda: not client.is_busy)
            assert (await health.probe()).ready

    asyncio.run(run())


def replace_deadline(request: Request, deadline_s: float) -> Request:
    import msgspec

    return msgspec.structs.replace(request, deadline_s=deadline_s)


def test_full_queue_is_refused_at_once(quick: EngineConfig) -> None:
    async def run() -> None:
        async with started(replace(quick, max_num_waiting=4)) as client:
            os.kill(client.pid or 0, signal.SIGSTOP)
            streams = [client.submit(short_request(str(i))) for i in range(8)]
            began_s = time.monotonic()
            with pytest.raises(Overloaded) as refused:
                client.submit(short_request("one too many"))
            assert time.monotonic() - began_s < 0.01
            assert refused.value.retry_after_s >= 1
            os.kill(client.pid or 0, signal.SIGCONT)
            for stream in streams:
                await stream.aclose()
            await until(lambda: not client.is_busy)
            assert await last_reason(client, short_request("later", 2)) == "length"

    asyncio.run(run())


@pytest.mark.slow
def test_engine_killed_twenty_times_under_load(quick: EngineConfig) -> None:
    ends: list[str] = []
    stopping = False

    async def load(client: ProcessClient, name: int) -> None:
        number = 0
        while not stopping:
            number += 1
            try:
                ends.append(await last_reason(client, short_request(f"{name}-{number}")) or "no end")
            except EngineDied:
                ends.append("died")
            except NotReady:
                await asyncio.sleep(0.01)

    async def run() -> None:
        nonlocal stopping
        async with started(quick) as client:
            pids = []
            workers = [asyncio.create_task(load(client, name)) for name in range(8)]
            for _ in range(20):
                await until(lambda: client.is_busy and client.stats.num_running > 0)
                pids.append(client.pid or 0)
                os.kill(pids[-1], signal.SIGKILL)
                await until(lambda pid=pids[-1]: client.pid != pid)
                assert await until(lambda: client.state == "ready") < 3.0
            stopping = True
            await asyncio.wait_for(asyncio.gather(*workers), 20)
            assert client.num_restarts == 20
            assert ends.count("died") >= 20
            assert set(ends) <= {"died", "length", "stop"}
            assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]  # noqa: ASYNC240
            names = {path.name for path in client._folder.path.iterdir()}
            assert names <= {"21.in", "21.out", "21.progress"}, names
            folder = client._folder.path
        assert not folder.exists()

    num_fds = len(os.listdir("/proc/self/fd"))
    asyncio.run(run())
    assert len(os.listdir("/proc/self/fd")) <= num_fds


LEFT_BEHIND = """
import os, sys
from llmserve.client.runtime_dir import FrontendFolder
folder = FrontendFolder()
(folder.path / "1.in").touch()
sys.stdout.write(str(folder.path))
sys.stdout.flush()
os.kill(os.getpid(), 9)
"""


def test_what_a_killed_frontend_left_is_removed_by_the_next() -> None:
    run = subprocess.run([sys.executable, "-c", LEFT_BEHIND], capture_output=True, check=False, timeout=30)
    left = Path(run.stdout.decode())
    assert left.is_dir()
    living = FrontendFolder()
    other = FrontendFolder()
    assert not left.exists()
    assert living.path.is_dir()
    for folder in (living, other):
        folder.close()
        assert not folder.path.exists()
    assert runtime_dir().stat().st_mode & 0o777 == 0o700


HOLDER = """
import sys, time
from llmserve._C import StepLease
with StepLease(sys.argv[1]) as held:
    print(held, flush=True)
    time.sleep(60)
"""


def test_lease_outlives_a_killed_holder_and_costs_little(tmp_path: Path) -> None:
    from llmserve._C import StepLease

    path = str(tmp_path / "lease")
    mine = StepLease(path, cores=[0, 1, *sorted(os.sched_getaffinity(0))])
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"True\n"
        holder.kill()
        with mine as held:
            assert held
    costs_s = []
    lease = StepLease(path, cores=[0, 1])
    for _ in range(2000):
        began_s = time.perf_counter()
        with lease:
            pass
        costs_s.append(time.perf_counter() - began_s)
    assert sorted(costs_s)[1000] < 5e-6  # under 1 µs on an idle machine
