"""What the prefix cache saves: the second prompt with a long common beginning, and conversations that grow.

    python -m benchmarks.engine.prefix

Pairs: two prompts that share their first 1,000 tokens, one after the other; TTFT of the second / TTFT of the first.
Conversations: 50 chats of 4 to 6 turns, eight at a time, the next turn of a random one first; histories are rendered
as text and encoded anew, as clients send them. A prompt's reusable tokens are the full blocks of its longest common
prefix with any sequence that had ended before (one token is always computed); more than that is not counted as reused.
"""

from __future__ import annotations

import random
import statistics
import sys
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.engine.probe import Conditions, Probe, Stream, arguments_of, conclude, conditions, resolve
from benchmarks.peers.quiet import Quiet
from llmserve import checkpoints, text
from llmserve.tools.bench_prompts import WORDS

MAX_TTFT_RATIO: Final = 0.15
MIN_REUSED: Final = 0.9
SHARED_TOKENS: Final = 1000
_OWN_TOKENS: Final = 16
_NUM_AT_ONCE: Final = 8
_ANSWER_TOKENS: Final = 24
_FIRST_ID: Final = 1000


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """Two prompts with a common beginning."""

    first_ttft_ms: float
    second_ttft_ms: float
    num_cached_tokens: int
    """Of the second."""


class Conversations(msgspec.Struct, frozen=True, kw_only=True):
    """A trace of chats."""

    num_chats: int
    num_requests: int
    prompt_tokens: int
    reusable_tokens: int
    reused_tokens: int
    reused_share: float


class PrefixResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result file."""

    conditions: Conditions
    shared_tokens: int
    ttft_ratio: float
    """Median of the pairs' ratios."""
    max_ttft_ratio: float
    min_reused_share: float
    pairs: list[Pair]
    conversations: Conversations


@dataclass(slots=True)
class _Chat:
    messages: list[dict[str, str]]
    num_turns_left: int
    stream: Stream | None = None
    prompt: list[int] = field(default_factory=list)


class _Trace:
    """Plays the chats and counts."""

    def __init__(self, probe: Probe, model: Path, num_chats: int) -> None:
        assets = checkpoints.open_text(model)
        self._probe = probe
        self._tokenizer = text.load_tokenizer(assets)
        self._template = text.load_chat_template(assets, self._tokenizer)
        self._random = random.Random(5)
        self._chats = [self._new_chat(number) for number in range(num_chats)]
        self._seen: list[list[int]] = []
        self.num_requests = self.prompt_tokens = self.reusable_tokens = self.reused_tokens = 0

    def run(self) -> None:
        """All turns of all chats."""
        waiting, running = list(self._chats), list[_Chat]()
        while waiting or running:
            while waiting and len(running) < _NUM_AT_ONCE:
                running.append(self._send(waiting.pop(self._random.randrange(len(waiting)))))
            self._probe.step()
            for chat in [chat for chat in running if chat.stream is not None and chat.stream.ended]:
                running.remove(chat)
                if self._take_answer(chat):
                    waiting.append(chat)

    def _new_chat(self, number: int) -> _Chat:
        system = "You are a helpful assistant." if number % 2 else f"You answer briefly. {self._words(40)}"
        return _Chat([{"role": "system", "content": system}], self._random.randint(4, 6))

    def _send(self, chat: _Chat) -> _Chat:
        assert self._template is not None
        chat.messages.append({"role": "user", "content": self._words(self._random.randint(15, 70))})
        chat.prompt = self._tokenizer.encode_chat(self._template.render(chat.messages, add_generation_prompt=True))
        self.num_requests += 1
        self.prompt_tokens += len(chat.prompt)
        reusable = reusable_tokens(chat.prompt, self._seen, self._probe.engine.info.block_size)
        chat.stream = self._probe.submit(chat.prompt, max_tokens=_ANSWER_TOKENS)
        self._probe.run_until(lambda: bool(chat.stream and chat.stream.times_s))
        self.reusable_tokens += reusable
        self.reused_tokens += min(reusable, chat.stream.num_cached_tokens)
        return chat

    def _take_answer(self, chat: _Chat) -> bool:
        """Says whether the chat goes on."""
        assert chat.stream is not None
        self._seen.append(chat.prompt + chat.stream.token_ids)
        answer = self._tokenizer.decode(chat.stream.token_ids, skip_special=True)
        chat.messages.append({"role": "assistant", "content": answer})
        chat.num_turns_left -= 1
        return chat.num_turns_left > 0

    def _words(self, num_words: int) -> str:
        return " ".join(self._random.choices(WORDS, k=num_words))


def reusable_tokens(prompt: list[int], seen: list[list[int]], block_size: int) -> int:
    """Full blocks of the longest common prefix with a sequence seen earlier, in tokens, less the last token."""
    longest = max((_common(prompt, other) for other in seen), default=0)
    return min(longest, len(prompt) - 1) // block_size * block_size


def _common(first: list[int], second: list[int]) -> int:
    return next(
        (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _random_ids(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(_FIRST_ID, 49_000) for _ in range(num_tokens)]


def measure_pair(probe: Probe, seed: int) -> Pair:
    """Fresh prompts, one after the other."""
    rng = random.Random(seed)
    shared = _random_ids(rng, SHARED_TOKENS)
    streams = []
    for _ in range(2):
        streams.append(probe.submit(shared + _random_ids(rng, _OWN_TOKENS), max_tokens=2))
        probe.run_until(lambda: streams[-1].ended)
    return Pair(
        first_ttft_ms=round(streams[0].ttft_s * 1000, 2),
        second_ttft_ms=round(streams[1].ttft_s * 1000, 2),
        num_cached_tokens=streams[1].num_cached_tokens,
    )


def measure_conversations(probe: Probe, model: Path, num_chats: int) -> Conversations:
    """One trace."""
    trace = _Trace(probe, model, num_chats)
    trace.run()
    return Conversations(
        num_chats=num_chats,
        num_requests=trace.num_requests,
        prompt_tokens=trace.prompt_tokens,
        reusable_tokens=trace.reusable_tokens,
        reused_tokens=trace.reused_tokens,
        reused_share=round(trace.reused_tokens / max(1, trace.reusable_tokens), 4),
    )


def main() -> int:
    parser = arguments_of(__doc__, "prefix.json")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--chats", type=int, default=50)
    arguments = parser.parse_args()
    model = resolve(arguments.model)
    probe = Probe(model, max_model_len=4096, kv_cache_bytes=2**31)
    seeds = count()
    measure_pair(probe, next(seeds))  # pages, threads
    measured = [
        Quiet(timeout_s=20.0, max_attempts=2).measure(lambda: measure_pair(probe, next(seeds)))
        for _ in range(arguments.pairs)
    ]
    pairs = [pair for pair, _ in measured]
    ratio = round(statistics.median(pair.second_ttft_ms / pair.first_ttft_ms for pair in pairs), 4)
    for pair, others in measured:
        print(
            f"TTFT {pair.first_ttft_ms:.1f} → {pair.second_ttft_ms:.1f} ms, {pair.num_cached_tokens} tokens cached, "
            f"others {others:.2f} cores"
        )
    print(f"TTFT of the second / first: {ratio:.1%} (median)")
    chats = measure_conversations(probe, model, arguments.chats)
    print(
        f"{chats.num_requests} requests of {chats.num_chats} chats: {chats.reused_tokens} of {chats.reusable_tokens} "
        f"reusable tokens reused ({chats.reused_share:.1%}); {chats.prompt_tokens} prompt tokens"
    )
    result = PrefixResult(
        conditions=conditions(model, max(others for _, others in measured)),
        shared_tokens=SHARED_TOKENS,
        ttft_ratio=ratio,
        max_ttft_ratio=MAX_TTFT_RATIO,
        min_reused_share=MIN_REUSED,
        pairs=pairs,
        conversations=chats,
    )
    misses = [f"TTFT ratio {ratio:.1%}"] if ratio > MAX_TTFT_RATIO else []
    misses += [f"reused {chats.reused_share:.1%}"] if chats.reused_share < MIN_REUSED else []
    return conclude(result, arguments.output, misses)


if __name__ == "__main__":
    sys.exit(main())
