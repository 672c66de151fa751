"""How far llmserve's and llama.cpp's next-token log-probabilities are from float32, on the same file and prefixes.

    python -m benchmarks.peers.accuracy [--binaries DIR]

The reference is `tests/data/smollm2_golden.json`: transformers in float32 on the dequantized weights. Compared are the
reference's most likely token and the prompt's own next token, at every fourth position of 20 prompts. llama-server
tells only its most likely tokens; positions where it leaves one out are left out for everybody, and counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import uvloop

from benchmarks.peers.llama_cpp import PEER, find_binaries
from benchmarks.peers.results import OURS, RESULTS, ModelFile, save_json
from llmserve import LLM
from llmserve.checkpoints import pull
from llmserve.errors import EngineFault
from llmserve.tools.bench_host import Host, describe_host
from llmserve.tools.bench_http import Endpoint, exchange
from llmserve.tools.bench_server import free_port, running_server
from llmserve.tools.bench_stats import percentile
from llmserve.types import SamplingParams

GOLDEN: Final = Path(__file__).resolve().parent.parent.parent / "tests" / "data" / "smollm2_golden.json"
_EVERY: Final = 4
_NUM_TOP: Final = 1000
"""Tokens that llama-server is asked for."""
_OUR_TOP: Final = 20
"""Enough to hold the reference's most likely token."""
_CONCURRENCY: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A prefix and what float32 says of the token after it."""

    prompt: int
    token_ids: list[int]
    """The prefix."""
    next_id: int
    next_logprob: float
    top_id: int
    top_logprob: float


class Error(msgspec.Struct, frozen=True, kw_only=True):
    """|Δ| of log-probabilities against the reference."""

    num_positions: int
    mean: float
    p99: float
    max: float


class EngineAccuracy(msgspec.Struct, frozen=True, kw_only=True):
    """One engine, over the positions that all engines told."""

    engine: str
    top_token: Error
    """Of the reference's most likely token."""
    next_token: Error
    """Of the prompt's own next token."""
    same_top_share: float
    """Positions, of those told, at which engine and reference hold the same token for the most likely."""


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """The result file."""

    host: Host
    model: ModelFile
    num_positions: int
    engines: list[EngineAccuracy]


@dataclass(frozen=True, slots=True)
class Told:
    """An engine's log-probabilities at one position; None where it does not tell."""

    top: float | None
    next: float | None
    top_id: int | None


def read_positions(golden: dict[str, Any]) -> list[Position]:
    """Every fourth position of each prompt."""
    return [
        Position(
            prompt=number,
            token_ids=prompt["token_ids"][: at + 1],
            next_id=prompt["token_ids"][at + 1],
            next_logprob=prompt["logprobs"][at],
            top_id=prompt["top_ids"][at],
            top_logprob=prompt["top_logprobs"][at],
        )
        for number, prompt in enumerate(golden["prompts"])
        for at in range(0, len(prompt["token_ids"]) - 1, _EVERY)
    ]


def ask_ours(model: Path, positions: Sequence[Position], prompts: list[list[int]], *, exact: bool) -> list[Told]:
    """Prompt log-probabilities of whole prompts, read at the positions."""
    with LLM(model, exact=exact, max_model_len=1024) as llm:
        answers = llm.generate(prompts, SamplingParams(max_tokens=0, num_prompt_logprobs=_OUR_TOP))
    told = []
    for position in positions:
        scores = answers[position.prompt].prompt_logprobs
        assert scores is not None
        score = scores[len(position.token_ids) - 1]
        found = dict(zip(score.top_ids, score.top_logprobs, strict=True))
        told.append(Told(found.get(position.top_id), score.logprob, score.top_ids[0]))
    return told


async def ask_peer(endpoint: Endpoint, positions: Sequence[Position]) -> list[Told]:
    """One token for each prefix, with the most likely ones."""
    slots = asyncio.Semaphore(_CONCURRENCY)

    async def ask(position: Position) -> Told:
        body = {
            "prompt": position.token_ids,
            "n_predict": 1,
            "n_probs": _NUM_TOP,
            "temperature": 0,
            "post_sampling_probs": False,
            "cache_prompt": False,
            "ignore_eos": True,  # else nothing is told before an end token; what is told is raw all the same
        }
        async with slots:
            request = endpoint.request("POST", "/completion", msgspec.json.encode(body))
            reply = await exchange(endpoint, request, timeout_s=300)
        if reply.failure is not None:
            raise EngineFault(f"{PEER}: {reply.failure}")
        told = msgspec.json.decode(reply.body).get("completion_probabilities")
        if not told:  # its token was an incomplete character
            return Told(None, None, None)
        tops = told[0]["top_logprobs"]
        found = {top["id"]: top["logprob"] for top in tops}
        return Told(found.get(position.top_id), found.get(position.next_id), tops[0]["id"])

    return await asyncio.gather(*map(ask, positions))


def judge(engine: str, positions: Sequence[Position], told: Sequence[Told], known: Sequence[Told]) -> EngineAccuracy:
    """Errors of `told` at the positions where `known`, the one that leaves tokens out, tells them."""
    rows = list(zip(positions, told, known, strict=True))
    tops = [abs(one.top - at.top_logprob) for at, one, peer in rows if peer.top is not None and one.top is not None]
    nexts = [
        abs(one.next - at.next_logprob) for at, one, peer in rows if peer.next is not None and one.next is not None
    ]
    same = [one.top_id == at.top_id for at, one, _ in rows]
    return EngineAccuracy(
        engine=engine, top_token=_error(tops), next_token=_error(nexts), same_top_share=round(statistics.mean(same), 4)
    )


def _error(values: list[float]) -> Error:
    mean, p99, high = statistics.mean(values), percentile(values, 99), max(values)
    return Error(num_positions=len(values), mean=round(mean, 5), p99=round(p99, 5), max=round(high, 5))


def main() -> None:
    """Ask all, print and write the errors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--binaries", type=Path, help="folder with llama-server")
    parser.add_argument("--out", type=Path, default=RESULTS / "local" / "accuracy.json", help="result file")
    args = parser.parse_args()
    golden = json.loads(GOLDEN.read_text())
    model = pull.resolve("smollm2")
    file = ModelFile.of(model)
    if file.sha256 != golden["sha256"]:
        raise SystemExit(f"{model} is not the file of {GOLDEN.name}")
    positions = read_positions(golden)
    prompts = [prompt["token_ids"] for prompt in golden["prompts"]]
    port = free_port()
    command = [str(find_binaries(args.binaries) / "llama-server"), "-m", str(model), "--port", str(port)]
    # One thread: figures do not depend on it, and it waits for no other one on a machine that is not quiet.
    slots = ["-t", "1", "-np", str(_CONCURRENCY), "-c", str(512 * _CONCURRENCY), "--no-cache-prompt", "-cram", "0"]
    with running_server([*command, *slots], port=port) as server:
        peer = uvloop.run(ask_peer(server.endpoint, positions))
    engines = {PEER: peer, OURS: ask_ours(model, positions, prompts, exact=False)}
    engines[f"{OURS} --exact"] = ask_ours(model, positions, prompts, exact=True)
    judged = [judge(name, positions, told, peer) for name, told in engines.items()]
    for one in judged:
        print(
            f"{one.engine:18} mean |Δ|: top token {one.top_token.mean:.4f} ({one.top_token.num_positions} positions), "
            f"next token {one.next_token.mean:.4f} ({one.next_token.num_positions}), same top {one.same_top_share:.1%}"
        )
    save_json(Accuracy(host=describe_host(), model=file, num_positions=len(positions), engines=judged), args.out)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
