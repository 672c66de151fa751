"""Exported metrics: their names, buckets and values."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmserve.errors import EngineFault
from llmserve.metrics import REQUEST_BUCKETS_S, STEP_TOKEN_BUCKETS, TOKEN_BUCKETS_S, TTFT_BUCKETS_S, Metrics
from llmserve.types import DraftStats, EngineStats, Output, Request, RequestTiming
from tests.service.scripted import Server, Wait, ids_of, says

GOLDEN = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:cache_config_info": "gauge",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:num_preemptions": "counter",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "llmserve_host_cache_hits": "counter",
    "vllm:spec_decode_num_drafts": "counter",
    "vllm:spec_decode_num_draft_tokens": "counter",
    "vllm:spec_decode_num_accepted_tokens": "counter",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "counter",
    "vllm:request_success": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:request_time_per_output_token_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_prefill_time_seconds": "histogram",
    "vllm:request_decode_time_seconds": "histogram",
    "vllm:request_inference_time_seconds": "histogram",
    "vllm:iteration_tokens_total": "histogram",
    "llmserve_http_responses": "counter",
}


def samples(text: str) -> dict[str, float]:
    """`name{labels without le and model_name}` → value."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
            found[sample.name + "".join(f" {name}={value}" for name, value in sorted(labels.items()))] = sample.value
    return found


def test_names_are_golden() -> None:
    families = text_string_to_metric_families(Metrics(model_name="m").render().decode())
    assert {family.name: family.type for family in families} == GOLDEN


def test_every_vllm_sample_bears_the_model_name() -> None:
    for family in text_string_to_metric_families(Metrics(model_name="m").render().decode()):
        if family.name.startswith("vllm:"):
            assert all(sample.labels["model_name"] == "m" for sample in family.samples)


def test_buckets() -> None:
    found = samples(Metrics(model_name="m").render().decode())
    for name, bounds in (
        ("time_to_first_token_seconds", TTFT_BUCKETS_S),
        ("inter_token_latency_seconds", TOKEN_BUCKETS_S),
        ("request_time_per_output_token_seconds", TOKEN_BUCKETS_S),
        ("e2e_request_latency_seconds", REQUEST_BUCKETS_S),
        ("request_queue_time_seconds", REQUEST_BUCKETS_S),
        ("request_prefill_time_seconds", REQUEST_BUCKETS_S),
        ("request_decode_time_seconds", REQUEST_BUCKETS_S),
        ("request_inference_time_seconds", REQUEST_BUCKETS_S),
        ("iteration_tokens_total", STEP_TOKEN_BUCKETS),
    ):
        labels = {key.split("le=")[1] for key in found if key.startswith(f"vllm:{name}_bucket")}
        assert labels == {*map(str, bounds), "+Inf"}


def test_a_value_on_a_bound_counts_in_its_bucket() -> None:
    metrics = Metrics(model_name="m")
    metrics.time_to_first_token.observe(0.25)
    buckets = dict(metrics.time_to_first_token.cumulative()[0])
    assert (buckets["0.1"], buckets["0.25"], buckets["+Inf"]) == (0.0, 1.0, 1.0)


def test_served_requests_are_counted() -> None:
    server = Server(says("abc"))

    async def act(http: httpx.AsyncClient) -> str:
        await http.post("/v1/completions", json={"prompt": "hi"})
        await http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2})
        server.client.script = lambda _: [EngineFault("x")]
        await http.post("/v1/completions", json={"prompt": "hi"})
        return (await http.get("/metrics")).text

    found = samples(server.run(act))
    assert found["vllm:request_success_total finished_reason=stop"] == 1
    assert found["vllm:request_success_total finished_reason=length"] == 1
    assert found["vllm:request_success_total finished_reason=error"] == 1
    assert found["vllm:time_to_first_token_seconds_count"] == 2
    assert found["vllm:inter_token_latency_seconds_count"] == 3 + 1
    assert found["vllm:request_generation_tokens_sum"] == 4 + 2
    assert found["vllm:kv_cache_usage_perc"] == 0.25
    assert found["vllm:generation_tokens_total"] == 3
    assert found["vllm:cache_config_info block_size=16 num_gpu_blocks=64"] == 1
    assert found["llmserve_http_responses_total route=/v1/completions status=200"] == 2
    assert found["llmserve_http_responses_total route=/v1/completions status=500"] == 1


def test_phases_of_answered_requests() -> None:
    timing = RequestTiming(arrival_s=100.0, scheduled_s=101.0, first_token_s=103.0)
    ended = RequestTiming(arrival_s=100.0, scheduled_s=101.0, first_token_s=103.0, end_s=107.0)

    def script(request: Request) -> Iterator[Output]:
        token_ids = tuple(ids_of("a"))
        yield Output(request_id=request.request_id, token_ids=token_ids, timing=timing)
        yield Output(request_id=request.request_id, token_ids=token_ids, finish_reason="length", timing=ended)

    server = Server(script)

    async def act(http: httpx.AsyncClient) -> str:
        await http.post("/v1/completions", json={"prompt": "hi"})
        return (await http.get("/metrics")).text

    found = samples(server.run(act))
    for phase, seconds in {"queue": 1.0, "prefill": 2.0, "decode": 4.0, "inference": 6.0}.items():
        assert found[f"vllm:request_{phase}_time_seconds_sum"] == seconds
        assert found[f"vllm:request_{phase}_time_seconds_count"] == 1


def test_a_stop_string_ends_the_phases_too() -> None:
    """The engine goes on until it is told; what it then says reaches nobody."""

    def script(request: Request) -> Iterator[Output | Wait]:
        timing = RequestTiming(request.arrival_s, request.arrival_s + 0.25, request.arrival_s + 0.5)
        for token_id in ids_of("a"):
            yield Output(request_id=request.request_id, token_ids=(token_id,), timing=timing)
        yield Wait()

    server = Server(script)

    async def act(http: httpx.AsyncClient) -> str:
        await http.post("/v1/completions", json={"prompt": "hi", "stop": "a"})
        return (await http.get("/metrics")).text

    found = samples(server.run(act))
    assert found["vllm:request_queue_time_seconds_sum"] == pytest.approx(0.25)
    assert found["vllm:request_decode_time_seconds_count"] == 1


def test_a_prompt_that_is_only_scored_has_no_decode() -> None:
    metrics = Metrics(model_name="m")
    metrics.note_timing(RequestTiming(arrival_s=1.0, scheduled_s=2.0, end_s=5.0), 5.0)
    found = samples(metrics.render().decode())
    assert found["vllm:request_prefill_time_seconds_sum"] == 3.0
    assert found["vllm:request_decode_time_seconds_count"] == 0


def test_a_passed_deadline_is_a_reason_of_its_own() -> None:
    server = Server(lambda request: [Output(request_id=request.request_id, finish_reason="deadline")])

    async def act(http: httpx.AsyncClient) -> str:
        await http.post("/v1/completions", json={"prompt": "hi"})
        return (await http.get("/metrics")).text

    found = samples(server.run(act))
    assert found["vllm:request_success_total finished_reason=deadline"] == 1
    assert found["vllm:request_success_total finished_reason=error"] == 0


def test_steps_of_the_engine_are_observed() -> None:
    server = Server(says("a"))
    server.client.stats = EngineStats(
        num_cache_queries=96,
        num_cache_hits=32,
        num_host_cache_hits=16,
        num_preemptions=2,
        drafts=DraftStats(5, 11, 7, (4, 3)),
    )
    server.client.on_step(EngineStats(num_steps=1, last_step_tokens=8))
    server.client.on_step(EngineStats(num_steps=2, last_step_tokens=100))

    async def act(http: httpx.AsyncClient) -> str:
        return (await http.get("/metrics")).text

    found = samples(server.run(act))
    assert found["vllm:iteration_tokens_total_sum"] == 108
    assert found["vllm:iteration_tokens_total_bucket le=8.0"] == 1
    assert found["vllm:prefix_cache_queries_total"] == 96
    assert found["vllm:prefix_cache_hits_total"] == 32
    assert found["llmserve_host_cache_hits_total"] == 16
    assert found["vllm:num_preemptions_total"] == 2
    assert found["vllm:spec_decode_num_drafts_total"] == 5
    assert found["vllm:spec_decode_num_draft_tokens_total"] == 11
    assert found["vllm:spec_decode_num_accepted_tokens_total"] == 7
    per_position = "vllm:spec_decode_num_accepted_tokens_per_pos_total position="
    assert (found[per_position + "0"], found[per_position + "1"]) == (4, 3)


def test_two_servers_share_nothing() -> None:
    first, second = Metrics(model_name="a"), Metrics(model_name="b")
    first.finished["stop"] += 1
    assert samples(second.render().decode())["vllm:request_success_total finished_reason=stop"] == 0
