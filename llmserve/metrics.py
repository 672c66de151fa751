"""Every metric that a server exports, with the names that dashboards for `vllm:` metrics already read.

Owns the names, the help texts and the buckets. Invariants: no global state (each `Metrics` has its own registry);
labels are bounded (`model_name`, finish reason, route, status), never users; recording costs well under a
microsecond, for prometheus-client is asked only when `/metrics` is read, and imported then.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from llmserve.types import EngineInfo, EngineStats, RequestTiming

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_BUCKETS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_BUCKETS_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
STEP_TOKEN_BUCKETS = (1.0, *(float(2**e) for e in range(3, 15)))
"""Tokens of a step: 1, 8, 16, … 16,384."""
LENGTH_BUCKETS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
"""Tokens: 1, 2, 5, 10, … 500,000."""

FINISH_REASONS = ("stop", "length", "abort", "deadline", "error")


class Histogram:
    """Counts of observations by bucket; one thread writes, one thread reads."""

    __slots__ = ("_bounds", "_counts", "_sum", "name", "text")

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self.name = name
        self.text = text
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one observation; a value on a bound belongs to the bucket below it."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def cumulative(self) -> tuple[list[tuple[str, float]], float]:
        """(bucket label, count up to it) for each bound and `+Inf`, and the sum of all observations."""
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
        return buckets, self._sum


class Metrics:
    """The metrics of one server and its one model. `engine` gives what the engine last said, or None before it did."""

    def __init__(
        self,
        *,
        model_name: str,
        engine: Callable[[], tuple[EngineInfo, EngineStats] | None] = lambda: None,
    ) -> None:
        self.model_name = model_name
        self._engine = engine
        self._registry: CollectorRegistry | None = None
        self.finished: Counter[str] = Counter(dict.fromkeys(FINISH_REASONS, 0))
        self.responses: Counter[tuple[str, str]] = Counter()
        """HTTP answers by (route, status)."""
        self.time_to_first_token = Histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", TTFT_BUCKETS_S
        )
        self.inter_token_latency = Histogram(
            "vllm:inter_token_latency_seconds", "Each gap between tokens of a sequence.", TOKEN_BUCKETS_S
        )
        self.time_per_output_token = Histogram(
            "vllm:request_time_per_output_token_seconds", "Mean gap between tokens of a sequence.", TOKEN_BUCKETS_S
        )
        self.e2e_latency = Histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the last token.", REQUEST_BUCKETS_S
        )
        self.prompt_tokens = Histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", LENGTH_BUCKETS)
        self.generation_tokens = Histogram(
            "vllm:request_generation_tokens", "Generated tokens of a sequence.", LENGTH_BUCKETS
        )

        self.queue_time = Histogram(
            "vllm:request_queue_time_seconds", "From arrival to the first step with it.", REQUEST_BUCKETS_S
        )
        self.prefill_time = Histogram(
            "vllm:request_prefill_time_seconds", "From its first step to the first token.", REQUEST_BUCKETS_S
        )
        self.decode_time = Histogram(
            "vllm:request_decode_time_seconds", "From the first token to the end.", REQUEST_BUCKETS_S
        )
        self.inference_time = Histogram(
            "vllm:request_inference_time_seconds", "From its first step to the end.", REQUEST_BUCKETS_S
        )
        self.step_tokens = Histogram("vllm:iteration_tokens_total", "Tokens of a step.", STEP_TOKEN_BUCKETS)

    def note_step(self, stats: EngineStats) -> None:
        """Take note of a step of the engine."""
        self.step_tokens.observe(stats.last_step_tokens)

    def note_timing(self, timing: RequestTiming, end_s: float) -> None:
        """Take note of how long the phases of an answered sequence took; it ended at `end_s`, monotonic."""
        if timing.scheduled_s:
            self.queue_time.observe(timing.scheduled_s - timing.arrival_s)
            self.inference_time.observe(end_s - timing.scheduled_s)
            self.prefill_time.observe((timing.first_token_s or end_s) - timing.scheduled_s)
        if timing.first_token_s:
            self.decode_time.observe(end_s - timing.first_token_s)

    def histograms(self) -> tuple[Histogram, ...]:
        """All histograms, in the order of export."""
        return (
            self.time_to_first_token,
            self.inter_token_latency,
            self.time_per_output_token,
            self.e2e_latency,
            self.prompt_tokens,
            self.generation_tokens,
            self.queue_time,
            self.prefill_time,
            self.decode_time,
            self.inference_time,
            self.step_tokens,
        )

    @property
    def registry(self) -> CollectorRegistry:
        """The registry of this server alone, made when first asked for."""
        if self._registry is None:
            from prometheus_client import CollectorRegistry

            self._registry = CollectorRegistry(auto_describe=False)
            self._registry.register(self)
        return self._registry

    def render(self) -> bytes:
        """The Prometheus text format of everything."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """prometheus-client's collector interface."""
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        yield from self._engine_families()
        finished = CounterMetricFamily(
            "vllm:request_success", "Finished sequences by reason.", labels=("model_name", "finished_reason")
        )
        for reason, count in self.finished.items():
            finished.add_metric((self.model_name, reason), count)
        yield finished
        for histogram in self.histograms():
            family = HistogramMetricFamily(histogram.name, histogram.text, labels=("model_name",))
            buckets, total = histogram.cumulative()
            family.add_metric((self.model_name,), buckets, total)
            yield family
        responses = CounterMetricFamily(
            "llmserve_http_responses", "HTTP answers by route and status.", labels=("route", "status")
        )
        for labels, count in self.responses.items():
            responses.add_metric(labels, count)
        yield responses

    def _engine_families(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        known = self._engine()
        info, stats = known if known is not None else (None, EngineStats())
        label = (self.model_name,)
        usage = stats.num_blocks_used / stats.num_blocks if stats.num_blocks else 0.0
        for name, text, value in (
            ("vllm:num_requests_running", "Sequences in the running batch.", stats.num_running),
            ("vllm:num_requests_waiting", "Sequences waiting to be admitted.", stats.num_waiting),
            ("vllm:kv_cache_usage_perc", "Share of KV cache blocks in use, 0 to 1.", usage),
        ):
            gauge = GaugeMetricFamily(name, text, labels=("model_name",))
            gauge.add_metric(label, value)
            yield gauge
        config = GaugeMetricFamily(
            "vllm:cache_config_info", "Shape of the KV cache.", labels=("model_name", "block_size", "num_gpu_blocks")
        )
        if info is not None:
            config.add_metric((self.model_name, str(info.block_size), str(info.num_blocks)), 1)
        yield config
        for name, text, value in (
            ("vllm:prompt_tokens", "Prompt tokens computed.", stats.num_prompt_tokens),
            ("vllm:generation_tokens", "Tokens generated.", stats.num_generation_tokens),
            ("vllm:num_preemptions", "Sequences preempted.", stats.num_preemptions),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.num_cache_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found there.", stats.num_cache_hits),
            ("llmserve_host_cache_hits", "Tokens brought back from the host.", stats.num_host_cache_hits),
            ("vllm:spec_decode_num_drafts", "Drafts verified.", stats.drafts.num_drafts),
            ("vllm:spec_decode_num_draft_tokens", "Tokens of drafts.", stats.drafts.num_draft_tokens),
            ("vllm:spec_decode_num_accepted_tokens", "Those that were right.", stats.drafts.num_accepted_tokens),
        ):
            counter = CounterMetricFamily(name, text, labels=("model_name",))
            counter.add_metric(label, value)
            yield counter
        positions = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Those that were right, by their position in the draft.",
            labels=("model_name", "position"),
        )
        for position, count in enumerate(stats.drafts.num_accepted_per_position):
            positions.add_metric((self.model_name, str(position)), count)
        yield positions
