"""The files, windows and bounds of the perplexity benchmark. Nothing is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest

from benchmarks.peers.llama_cpp import PEER
from benchmarks.peers.perplexity import EXACT, FIRST, WINDOW, Perplexities, judge, merged, misses, read_peer_file
from benchmarks.peers.perplexity_models import BLOCK, Widths, count_types, write_float32
from benchmarks.peers.results import OURS, ModelFile, save_json
from llmserve.checkpoints import open_checkpoint
from llmserve.checkpoints.dequantize import dequantize
from llmserve.errors import EngineFault
from llmserve.models.catalog import load_model
from llmserve.tools.bench_host import describe_host
from tests.ops.running import build_executor, prompt_logprobs
from tests.ops.seeds import fresh_seed
from tests.tiny import checkpoints
from tests.tiny.models import MODELS, VOCAB_SIZE, prompt_ids

MODEL = replace(MODELS["llama_gguf_q4_0"], norm_eps=0.3)  # an epsilon that counts
FILE = ModelFile(name="m", sha256="0", num_bytes=1)


def reference_logprobs(path: Path) -> np.ndarray:
    checkpoint = open_checkpoint(path)
    executor = build_executor("reference", checkpoint.config, load_model(checkpoint), num_tokens=64, num_blocks=64)
    prompt = prompt_ids(MODEL)
    return prompt_logprobs(executor, prompt, chunks=(len(prompt),), vocab_size=VOCAB_SIZE)


def test_the_widened_model_computes_the_same(tmp_path: Path) -> None:
    source, wide = checkpoints.write(MODEL, tmp_path), tmp_path / "wide.gguf"
    write_float32(source, wide, widen=True)
    expected, found = reference_logprobs(source), reference_logprobs(wide)
    assert np.std(expected) > 2
    np.testing.assert_allclose(found, expected, atol=1e-4)
    shapes = [tensor.shape for tensor in open_checkpoint(wide).tensors.values() if len(tensor.shape) == 2]
    assert {columns % BLOCK for _, columns in shapes} == {0}
    assert Widths.of(gguf.GGUFReader(source)).widened() == Widths.of(gguf.GGUFReader(wide))


def test_a_file_in_float32_has_the_source_s_weights(tmp_path: Path) -> None:
    source, plain = checkpoints.write(MODEL, tmp_path), tmp_path / "plain.gguf"
    write_float32(source, plain, widen=False)
    assert set(count_types(plain)) == {"F32"}
    expected = open_checkpoint(source).tensors
    for name, tensor in open_checkpoint(plain).tensors.items():
        np.testing.assert_array_equal(dequantize(tensor), dequantize(expected[name]), err_msg=name)


def write_peer_file(path: Path, windows: list[list[int]], logprobs: np.ndarray) -> None:
    """As llama-perplexity keeps them: [windows, scored, vocabulary]."""
    vocab = logprobs.shape[2]
    lowest = logprobs.min(axis=2, keepdims=True)
    step = (logprobs.max(axis=2, keepdims=True) - lowest) / 65535
    codes = np.rint((logprobs - lowest) / step).astype("<u2")
    header = np.concatenate([step, lowest], axis=2).astype("<f4").view("<u2")
    pad = np.zeros((*codes.shape[:2], vocab % 2), "<u2")
    sizes = np.array([WINDOW, vocab, len(windows)], "<i4")
    body = np.concatenate([header, codes, pad], axis=2)
    path.write_bytes(b"_logits_" + sizes.tobytes() + np.array(windows, "<i4").tobytes() + body.tobytes())


@pytest.mark.parametrize("vocab", [50, 51])
def test_the_peer_s_file_is_read(vocab: int, tmp_path: Path) -> None:
    seed = fresh_seed()
    random = np.random.default_rng(seed)
    windows = random.integers(0, vocab, (2, WINDOW)).tolist()
    logprobs = -random.uniform(0, 16, (2, WINDOW - FIRST, vocab))
    write_peer_file(tmp_path / "peer", windows, logprobs)
    expected = [logprobs[w, i, windows[w][FIRST + i]] for w in range(2) for i in range(WINDOW - FIRST)]
    found = read_peer_file(tmp_path / "peer", windows)
    lowest = np.isclose(expected, logprobs.min(axis=2).reshape(-1), atol=1e-4)
    assert 0 < lowest.sum() < len(expected) / 4
    np.testing.assert_array_equal(np.isnan(found), lowest, err_msg=f"seed={seed}")
    np.testing.assert_allclose(found[~lowest], np.array(expected)[~lowest], atol=2e-4, err_msg=f"seed={seed}")
    windows[1][7] += 1
    with pytest.raises(EngineFault, match="other tokens"):
        read_peer_file(tmp_path / "peer", windows)


def told(ours: float, exact: float, peer: float) -> list[str]:
    """Bounds missed by engines that are so far from float32 at every token, with alternating signs (peer) or not."""
    reference = np.full(400, -2.0)
    signs = np.where(np.arange(400) % 2 == 0, 1, -1)
    noise = 1 + 0.1 * np.sin(np.arange(400.0))
    engines = {PEER: reference + peer * signs * noise, OURS: reference + ours * signs, EXACT: reference + exact}
    return misses(judge("Q4_0", FILE, {"Q4_0": 1}, False, reference, engines))


def test_bounds_are_met_and_missed() -> None:
    assert told(0.03, 0.0009, 0.04) == []
    (missed,) = told(0.03, 0.0011, 0.04)
    assert f"{EXACT}: perplexity -0.11% from float32, the bound is 0.1%" in missed
    (missed,) = told(0.05, 0.0, 0.04)
    assert "mean |Δ| exceeds that of llama.cpp by 0.01" in missed


def test_what_the_peer_does_not_tell_is_left_out_for_everybody() -> None:
    reference = np.linspace(-3, -1, 50)
    engines = {name: reference + 0.0005 for name in (PEER, OURS, EXACT)}  # noqa: C420 - each its own array
    engines[PEER][7], engines[OURS][7] = np.nan, -100.0
    judged = judge("Q4_0", FILE, {"Q4_0": 1}, False, reference, engines)
    assert judged.num_scored == 49
    assert [engine.mean for engine in judged.engines] == [0.0005] * 3
    engines[OURS][8] = np.nan
    assert len(misses(judge("Q4_0", FILE, {"Q4_0": 1}, False, reference, engines))) == 2


def test_a_difference_within_noise_is_no_miss() -> None:
    assert told(0.0401, 0.0, 0.04) == []
    assert told(0.0405, 0.0, 0.04) != []


def test_a_perplexity_that_is_not_a_number_is_missed() -> None:
    assert len(told(float("nan"), 0.0, 0.04)) == 2


def test_types_measured_earlier_over_the_same_text_are_kept(tmp_path: Path) -> None:
    reference = np.linspace(-3, -1, 50)
    engines = dict.fromkeys((PEER, OURS, EXACT), reference + 0.01)
    one, other = (judge(kind, FILE, {kind: 1}, False, reference, engines) for kind in ("Q5_0", "Q4_0"))
    result = Perplexities(host=describe_host(), source=FILE, text_sha256="1", num_windows=1, num_scored=50, types=[one])
    out = tmp_path / "out.json"
    save_json(result, out)
    newer = msgspec.structs.replace(result, types=[other])
    assert [each.type for each in merged(out, newer).types] == ["Q4_0", "Q5_0"]
    of_other_text = msgspec.structs.replace(newer, text_sha256="2")
    assert merged(out, of_other_text).types == [other]
