"""What speculation gains for one stream that repeats its prompt, and what it costs a full batch of prose.

    python -m benchmarks.engine.speculation

One stream: 30 prompts of `benchmarks/data/speculation.json` (15 texts to summarise, 15 functions to edit), greedy, one
after another, each with and without speculation in turn. The speed-up is of the time from the first token to the last,
summed over the prompts; that of whole requests is given beside it. Full batch: 32 windows of prose are continued
together, sampled at temperature 1, so that hardly anything repeats; the loss is of their time from the step on in
which all decode. Tokens must be the same with and without.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.engine.probe import Conditions, Probe, Stream, arguments_of, conclude, conditions, resolve
from benchmarks.peers.quiet import Quiet
from llmserve import checkpoints, text
from llmserve.tools.bench_stats import percentile

DATA: Final = Path(__file__).resolve().parent.parent / "data"
PROMPTS: Final = DATA / "speculation.json"
PROMPTS_SHA256: Final = "3bf213cdb76fa6b8101978781a540d108fc366334c3efe55d74a2531b68c43c5"
PROSE: Final = DATA / "prose.txt"
PROSE_SHA256: Final = "18decd0eac6d0e58741b560d877f2ae45233755d7a9ccdeaac8201c45d357654"
MIN_SPEED_UP: Final = 1.4
MAX_LOSS: Final = 0.02
BATCH_SIZE: Final = 32
_PROSE_TOKENS: Final = 128
_MODES: Final = ("off", "auto")


class One(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt, alone."""

    kind: str
    num_prompt_tokens: int
    num_tokens: int
    off_s: float
    """From the first token to the last, without speculation."""
    auto_s: float
    off_request_s: float
    auto_request_s: float
    is_same: bool


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """The prose, once with and once without."""

    num_tokens: int
    off_s: float
    auto_s: float
    num_draft_tokens: int
    num_accepted_tokens: int
    is_same: bool


class SpeculationResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result file."""

    conditions: Conditions
    prompts_sha256: str
    prose_sha256: str
    max_tokens: int
    speed_up: float
    speed_up_by_kind: dict[str, float]
    request_speed_up: float
    accepted_share: float
    """Of the drafted tokens of single streams."""
    min_speed_up: float
    loss: float
    """Median over the rounds; negative: a gain."""
    max_loss: float
    singles: list[One]
    batches: list[Batch]


@dataclass(frozen=True, slots=True)
class _Prompt:
    kind: str
    token_ids: list[int]


class _Bench:
    """Two engines of the same model, one of which speculates."""

    def __init__(self, model: Path, max_tokens: int) -> None:
        assets = checkpoints.open_text(model)
        self._tokenizer = text.load_tokenizer(assets)
        self._template = text.load_chat_template(assets, self._tokenizer)
        self._max_tokens = max_tokens
        self._probes = {
            "off": Probe(model, max_model_len=2048, kv_cache_bytes=2**29, max_num_seqs=64),
            "auto": Probe(model, max_model_len=2048, kv_cache_bytes=2**29, max_num_seqs=64, speculation="auto"),
        }

    def prompts(self) -> list[_Prompt]:
        entries = json.loads(_read(PROMPTS, PROMPTS_SHA256))
        return [_Prompt(entry["kind"], self._chat(f"{entry['instruction']}\n\n{entry['text']}")) for entry in entries]

    def windows(self) -> list[list[int]]:
        """Prompts of prose, none of which overlap."""
        ids = self._tokenizer.encode(_read(PROSE, PROSE_SHA256), add_special=False)
        stride = len(ids) // BATCH_SIZE
        return [ids[start : start + min(stride, _PROSE_TOKENS)] for start in range(0, stride * BATCH_SIZE, stride)]

    def single(self, prompt: _Prompt, *, first: int) -> One:
        """One prompt by both engines, the one of that number first."""
        streams: dict[str, Stream] = {}
        for mode in (_MODES[first], _MODES[1 - first]):
            probe = self._probes[mode]
            streams[mode] = probe.submit(
                prompt.token_ids, max_tokens=self._max_tokens, stop_token_ids=tuple(self._tokenizer.eog_ids)
            )
            probe.run_until(lambda stream=streams[mode]: stream.ended)  # type: ignore[misc]
        off, auto = streams["off"], streams["auto"]
        return One(
            kind=prompt.kind, num_prompt_tokens=len(prompt.token_ids), num_tokens=len(off.token_ids),
            off_s=_decode_s(off), auto_s=_decode_s(auto), off_request_s=off.times_s[-1] - off.submitted_s,
            auto_request_s=auto.times_s[-1] - auto.submitted_s, is_same=off.token_ids == auto.token_ids,
        )  # fmt: skip

    def batch(self, windows: Sequence[list[int]], *, first: int) -> Batch:
        """All windows together by both engines."""
        found: dict[str, list[Stream]] = {}
        seconds = {}
        before = self._probes["auto"].engine.stats().drafts
        for mode in (_MODES[first], _MODES[1 - first]):
            probe = self._probes[mode]
            streams = found[mode] = [
                probe.submit(window, max_tokens=self._max_tokens, temperature=1.0, seed=number)
                for number, window in enumerate(windows)
            ]
            probe.run_until(lambda streams=streams: all(stream.token_ids for stream in streams))  # type: ignore[misc]
            started_s = max(stream.times_s[0] for stream in streams)
            probe.run_until(lambda streams=streams: all(stream.ended for stream in streams))  # type: ignore[misc]
            seconds[mode] = max(stream.times_s[-1] for stream in streams) - started_s
        drafts = self._probes["auto"].engine.stats().drafts
        return Batch(
            num_tokens=sum(len(stream.token_ids) for stream in found["off"]),
            off_s=seconds["off"],
            auto_s=seconds["auto"],
            num_draft_tokens=drafts.num_draft_tokens - before.num_draft_tokens,
            num_accepted_tokens=drafts.num_accepted_tokens - before.num_accepted_tokens,
            is_same=[stream.token_ids for stream in found["off"]] == [stream.token_ids for stream in found["auto"]],
        )

    def accepted_share(self) -> float:
        drafts = self._probes["auto"].engine.stats().drafts
        return drafts.num_accepted_tokens / max(1, drafts.num_draft_tokens)

    def _chat(self, content: str) -> list[int]:
        if self._template is None:
            return self._tokenizer.encode(content, add_special=True)
        messages = [{"role": "user", "content": content}]
        return self._tokenizer.encode_chat(self._template.render(messages, add_generation_prompt=True))


def _read(path: Path, sha256: str) -> str:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise SystemExit(f"{path}: not the text whose results are compared")
    return data.decode()


def _decode_s(stream: Stream) -> float:
    return stream.times_s[-1] - stream.times_s[0]


def _ratio(singles: Sequence[One]) -> float:
    return round(sum(one.off_s for one in singles) / sum(one.auto_s for one in singles), 3)


def _misses(result: SpeculationResult) -> list[str]:
    misses = []
    if result.speed_up < MIN_SPEED_UP:
        misses.append(f"one stream is {result.speed_up:.2f} times as quick, not {MIN_SPEED_UP:g}")
    if result.loss > MAX_LOSS:
        misses.append(f"a batch of {BATCH_SIZE} loses {result.loss:.1%}, not at most {MAX_LOSS:.0%}")
    if not all([*(one.is_same for one in result.singles), *(batch.is_same for batch in result.batches)]):
        misses.append("tokens differ with and without")
    return misses


def measure(model: Path, *, num_prompts: int, max_tokens: int, num_rounds: int) -> SpeculationResult:
    """Single streams first, then `num_rounds` of the batch."""
    bench = _Bench(model, max_tokens)
    prompts, windows = bench.prompts(), bench.windows()
    bench.single(prompts[0], first=0)  # pages, threads, step times
    chosen = prompts if num_prompts >= len(prompts) else prompts[:: len(prompts) // num_prompts][:num_prompts]
    quiet = Quiet(timeout_s=20.0, max_attempts=1)
    singles, others = quiet.measure(lambda: [bench.single(one, first=i % 2) for i, one in enumerate(chosen)])
    share = bench.accepted_share()
    batches, more_others = quiet.measure(lambda: [bench.batch(windows, first=i % 2) for i in range(num_rounds)])
    return SpeculationResult(
        conditions=conditions(model, max(others, more_others)),
        prompts_sha256=PROMPTS_SHA256,
        prose_sha256=PROSE_SHA256,
        max_tokens=max_tokens,
        speed_up=_ratio(singles),
        speed_up_by_kind={
            kind: _ratio([one for one in singles if one.kind == kind]) for kind in sorted({one.kind for one in singles})
        },
        request_speed_up=round(
            sum(one.off_request_s for one in singles) / sum(one.auto_request_s for one in singles), 3
        ),
        accepted_share=round(share, 3),
        min_speed_up=MIN_SPEED_UP,
        loss=round(percentile([batch.auto_s / batch.off_s - 1 for batch in batches], 50), 4),
        max_loss=MAX_LOSS,
        singles=singles,
        batches=batches,
    )


def main() -> int:
    parser = arguments_of(__doc__, "speculation.json")
    parser.add_argument("--prompts", type=int, default=30, help="fewer: a quick look (default: all 30)")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="of the batch")
    arguments = parser.parse_args()
    result = measure(
        resolve(arguments.model),
        num_prompts=arguments.prompts,
        max_tokens=arguments.max_tokens,
        num_rounds=arguments.rounds,
    )
    print("| kind | prompt | tokens | off s | auto s | × |\n|---|---:|---:|---:|---:|---:|")
    for one in result.singles:
        print(
            f"| {one.kind} | {one.num_prompt_tokens} | {one.num_tokens} | {one.off_s:.2f} | {one.auto_s:.2f} | "
            f"{one.off_s / max(one.auto_s, 1e-9):.2f} |"
        )
    for batch in result.batches:
        print(
            f"batch of {BATCH_SIZE}: {batch.off_s:.2f} s without, {batch.auto_s:.2f} s with; "
            f"{batch.num_accepted_tokens} of {batch.num_draft_tokens} drafted tokens accepted"
        )
    print(
        f"one stream × {result.speed_up:.2f} ({result.speed_up_by_kind}; whole requests × "
        f"{result.request_speed_up:.2f}; {result.accepted_share:.0%} of drafted tokens accepted), "
        f"batch loss {result.loss:.1%}, "
        f"others {result.conditions.others_cores:.2f} cores"
    )
    return conclude(result, arguments.output, _misses(result))


if __name__ == "__main__":
    sys.exit(main())
