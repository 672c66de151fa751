"""The sampler by every kind of launchers against the reference sampler: the same token in every row."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest

from llmserve.ops import philox
from llmserve.ops.protocol import NO_TOKEN, NOT_FINITE, SamplingState, StepInput
from llmserve.ops.reference_sampler import sample_step
from tests.ops.seeds import fresh_seed

torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

if TYPE_CHECKING:
    from torch import Tensor

    from llmserve.ops.cuda.launchers import Launchers

from llmserve.ops.cuda.launchers import of_library  # noqa: E402
from llmserve.ops.cuda.library import open_library  # noqa: E402
from llmserve.ops.cuda.sample import SampleRows, workspace_bytes  # noqa: E402
from tests.cuda import emulation  # noqa: E402
from tests.cuda.rows import guarded, is_untouched_around  # noqa: E402
from tests.cuda.sampling import VOCABS, Logits, device_rows, random_logits, random_step  # noqa: E402


class _Typical:
    """A sampling state of which typical_p alone differs from the default."""

    def __init__(self, typical_p: float) -> None:
        self.typical_p = typical_p
        self.token_ids: list[int] = []
        self.num_prompt_tokens = self.min_tokens = 0
        self.repetition_penalty = 1.0
        self.frequency_penalty = self.presence_penalty = 0.0
        self.logit_bias = self.bad_words = self.stop_token_ids = ()
        self.allowed_token_ids = None

    def rewind(self, position: int) -> None: ...

    def record(self, token_id: int) -> None: ...


def run(launchers: Launchers, logits: Logits, rows: SampleRows, *, gap: int = 0) -> list[int]:
    num_rows, vocab = logits.shape
    memory = torch.full((num_rows, vocab + gap), float("nan"), device=launchers.device)
    memory[:, :vocab] = torch.from_numpy(logits).to(launchers.device)
    workspace = torch.full((workspace_bytes(num_rows, vocab),), 0xAB, dtype=torch.uint8, device=launchers.device)
    token_ids, around = guarded(1, num_rows, torch.int32, launchers.device)
    launchers.sample(memory[:, :vocab], rows, token_ids[0], workspace)
    assert is_untouched_around(token_ids, around)
    return cast("list[int]", token_ids[0].tolist())


def expected(logits: Logits, step: StepInput, *, typical_p: Logits | None = None) -> list[int]:
    if typical_p is not None:
        step.states = [cast("SamplingState", _Typical(float(p))) for p in typical_p]
    with np.errstate(invalid="ignore", divide="ignore"):
        return cast("list[int]", sample_step(logits, step).token_ids.tolist())


def test_the_workspace_is_as_long_as_the_kernels_say() -> None:
    if not emulation.EMULATOR.exists():
        pytest.skip("the kernels are not built for the CPU: make cuda-emulator, which needs CUDA's headers")
    said = ctypes.CDLL(str(emulation.EMULATOR)).llmserve_cuda_sample_workspace
    said.argtypes, said.restype = (ctypes.c_int64, ctypes.c_int64), ctypes.c_int64
    for num_rows, vocab in ((1, 1), (3, 4096), (7, 4097), (256, 128_256)):
        assert said(num_rows, vocab) == workspace_bytes(num_rows, vocab)


@pytest.mark.parametrize("vocab", VOCABS)
def test_agrees_with_the_reference(launchers: Launchers, vocab: int) -> None:
    seed = fresh_seed()
    draws = np.random.default_rng(seed)
    num_rows = 24 if vocab > 1000 else 60
    logits, step = random_logits(draws, num_rows, vocab), random_step(draws, num_rows, vocab)
    found = run(launchers, logits, device_rows(step, launchers.device), gap=vocab % 3)
    assert found == expected(logits, step), f"seed={seed}"


@pytest.mark.parametrize("vocab", VOCABS)
def test_typical_p_agrees_with_the_reference(launchers: Launchers, vocab: int) -> None:
    seed = fresh_seed()
    draws = np.random.default_rng(seed)
    num_rows = 24
    logits, step = random_logits(draws, num_rows, vocab), random_step(draws, num_rows, vocab)
    typical_p = draws.choice([0.05, 0.45, 0.9, 0.99, 1], num_rows).astype(np.float32)
    found = run(launchers, logits, device_rows(step, launchers.device, typical_p=typical_p))
    assert found == expected(logits, step, typical_p=typical_p), f"seed={seed}"


@pytest.mark.parametrize("spread", ["flat", "wide", "peaked"])
def test_more_tokens_pass_than_shared_memory_takes(launchers: Launchers, spread: str) -> None:
    """Survivors of every filter in more than one chunk and beyond 8,192; with "flat" in one bin of the histogram."""
    seed, vocab = fresh_seed(), 20_011
    draws = np.random.default_rng(seed)
    logits = (draws.normal(size=(8, vocab)) * {"flat": 1e-5, "wide": 1.0, "peaked": 5.0}[spread]).astype(np.float32)
    step = random_step(draws, len(logits), vocab)
    step.targets[:], step.temperature[:] = -1, 1.3
    step.top_k[:] = [0, 0, 15_000, 15_000, 0, 0, 12_345, 0]
    step.top_p[:] = [1, 0.95, 1, 0.99, 1, 0.999, 0.5, 0.9]
    step.min_p[:] = [0, 0, 0, 0, 0.001, 0.001, 0.001, 0]
    typical_p = np.ones(len(logits), np.float32)
    typical_p[6:] = 0.9
    found = run(launchers, logits, device_rows(step, launchers.device, typical_p=typical_p))
    assert found == expected(logits, step, typical_p=typical_p), f"seed={seed}"


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [128_256, 262_144])
def test_large_vocabularies_on_a_gpu(vocab: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU is usable here")
    seed = fresh_seed()
    draws = np.random.default_rng(seed)
    logits, step = random_logits(draws, 64, vocab), random_step(draws, 64, vocab)
    launchers = of_library(open_library())
    assert run(launchers, logits, device_rows(step, launchers.device)) == expected(logits, step), f"seed={seed}"


def test_exactly_k_of_equal_tokens(launchers: Launchers) -> None:
    """The lowest ids among equals, and each of them with the same chance."""
    logits = np.full((60, 300), 2.0, np.float32)
    logits[:, ::2] = -1.0
    step = random_step(np.random.default_rng(fresh_seed()), len(logits), 300)
    step.targets[:], step.temperature[:], step.top_k[:], step.top_p[:], step.min_p[:] = -1, 1, 5, 1, 0
    found = set(run(launchers, logits, device_rows(step, launchers.device)))
    assert found <= {1, 3, 5, 7, 9}
    assert len(found) >= 4, "fewer is a chance of 1e-12"


def test_the_draw_is_the_philox_number(launchers: Launchers) -> None:
    """Of 1,000 equal tokens, u names one: seeds and positions of more than 32 bits, the top bit of the seed set."""
    step = random_step(np.random.default_rng(fresh_seed()), 20, 1000)
    step.targets[:], step.temperature[:], step.top_k[:], step.top_p[:], step.min_p[:] = -1, 1, 0, 1, 0
    step.seed[:4] = [0, 2**64 - 1, 2**63, 1]
    found = run(launchers, np.zeros((20, 1000), np.float32), device_rows(step, launchers.device))
    pairs = zip(step.seed.tolist(), step.sample_position.tolist(), strict=True)
    assert found == [int(philox.uniform(seed, position) * 1000) for seed, position in pairs]


def test_void_rows(launchers: Launchers) -> None:
    logits = np.zeros((6, 40), np.float32)
    logits[0, 7], logits[1, 9], logits[2] = np.nan, np.inf, -np.inf
    logits[3, 39], logits[4, 1:] = -np.nan, -np.inf
    step = random_step(np.random.default_rng(1), 6, 40)
    for temperature in (0.0, 1.0):
        step.temperature[:] = temperature
        for target in (-1, 3):
            step.targets[:] = target
            found = run(launchers, logits, device_rows(step, launchers.device))
            assert found[:4] == [NOT_FINITE] * 4
            assert found[4] == (0 if target < 0 else 3)


def test_edited_rows_are_sampled_and_the_raw_ones_judged(launchers: Launchers) -> None:
    seed, vocab = fresh_seed(), 257
    draws = np.random.default_rng(seed)
    raw, edited = random_logits(draws, 10, vocab), draws.normal(size=(4, vocab)).astype(np.float32)
    raw[:8] = draws.normal(size=(8, vocab))
    raw[8], raw[9] = np.nan, 0
    edited[2], edited[3, 5] = -np.inf, np.nan
    index = np.array([-1, 0, 1, -1, 2, 3, 0, 2, 0, 1], np.int32)
    step = random_step(draws, 10, vocab)
    step.targets[:] = -1
    step.targets[7] = 11
    token_ids = torch.empty(10, dtype=torch.int32, device=launchers.device)
    launchers.sample(
        torch.from_numpy(raw).to(launchers.device),
        device_rows(step, launchers.device),
        token_ids,
        torch.empty(workspace_bytes(10, vocab), dtype=torch.uint8, device=launchers.device),
        edited=torch.from_numpy(edited).to(launchers.device),
        edited_rows=torch.from_numpy(index).to(launchers.device),
    )
    sampled = np.where(index[:, None] < 0, raw, edited[index])
    sampled[[4, 5, 7, 8]] = 0
    want = expected(sampled, step)
    want[4], want[5], want[7], want[8] = NO_TOKEN, NOT_FINITE, 11, NOT_FINITE
    assert token_ids.tolist() == want, f"seed={seed}"


def test_a_row_does_not_depend_on_the_others(launchers: Launchers) -> None:
    seed, vocab = fresh_seed(), 1000
    draws = np.random.default_rng(seed)
    logits, step = random_logits(draws, 12, vocab), random_step(draws, 12, vocab)
    rows = device_rows(step, launchers.device)
    together = run(launchers, logits, rows)
    fields = [name for name in SampleRows.__dataclass_fields__ if name != "typical_p"]
    for row in range(len(logits)):
        alone = replace(rows, **{name: getattr(rows, name)[row : row + 1] for name in fields})
        assert run(launchers, logits[row : row + 1], alone) == together[row : row + 1], f"row {row} seed={seed}"


@pytest.mark.parametrize("mistake", ["top_k", "top_p", "min_p", "temperature", "position"])
def test_what_the_comparison_finds(launchers: Launchers, mistake: str) -> None:
    draws = np.random.default_rng(fresh_seed())
    logits, step = draws.normal(size=(48, 33)).astype(np.float32), random_step(draws, 48, 33)
    step.targets[:], step.temperature[:], step.top_k[:], step.top_p[:], step.min_p[:] = -1, 1, 12, 0.9, 0.1
    want = expected(logits, step)
    if mistake == "position":
        step.sample_position[:] += 1
    else:
        {"top_k": step.top_k, "top_p": step.top_p, "min_p": step.min_p, "temperature": step.temperature}[mistake][:] = {
            "top_k": 4,
            "top_p": 0.5,
            "min_p": 0.5,
            "temperature": 0.6,
        }[mistake]
    assert run(launchers, logits, device_rows(step, launchers.device)) != want


def test_no_rows_are_no_work(launchers: Launchers) -> None:
    step = random_step(np.random.default_rng(1), 0, 8)
    assert run(launchers, np.zeros((0, 8), np.float32), device_rows(step, launchers.device)) == []


@pytest.mark.parametrize("wrong", ["logits", "top_k", "seed", "typical_p", "token_ids", "workspace", "edited"])
def test_what_does_not_fit_is_named(launchers: Launchers, wrong: str) -> None:
    on = launchers.device
    rows = device_rows(random_step(np.random.default_rng(1), 3, 40), on)
    rows = replace(
        rows,
        top_k=rows.top_k.float() if wrong == "top_k" else rows.top_k,
        seed=rows.seed[:2] if wrong == "seed" else rows.seed,
        typical_p=torch.ones(2 if wrong == "typical_p" else 3, device=on),
    )
    logits: Tensor = torch.zeros((3, 40), device=on)
    size = workspace_bytes(3, 40) - (1 if wrong == "workspace" else 0)
    with pytest.raises(ValueError, match=f"^{wrong}: "):
        launchers.sample(
            logits.double() if wrong == "logits" else logits,
            rows,
            torch.zeros(3, dtype=torch.int64 if wrong == "token_ids" else torch.int32, device=on),
            torch.zeros(size, dtype=torch.uint8, device=on),
            edited=logits if wrong == "edited" else None,
        )
