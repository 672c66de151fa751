"""Log-probabilities, ranks and the most likely tokens by every kind of launchers against the reference sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pytest

from llmserve.ops.protocol import NO_TOKEN, NOT_FINITE, StepOutput
from llmserve.ops.reference_sampler import sample_step
from tests.ops.seeds import fresh_seed

torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

if TYPE_CHECKING:
    from llmserve.ops.cuda.launchers import Launchers

from tests.cuda.rows import guarded, is_untouched_around  # noqa: E402
from tests.cuda.sampling import VOCABS, Logits, random_logits, random_step  # noqa: E402

ABSOLUTE: Final = 5e-7
"""What float32 exponentials may do to the logarithm of their sum."""
RELATIVE: Final = 2.0**-23


def run(launchers: Launchers, logits: Logits, tokens: list[int], counts: list[int], *, most: int) -> StepOutput:
    on, (num_rows, vocab) = launchers.device, logits.shape
    memory = torch.full((num_rows, vocab + vocab % 3), float("nan"), device=on)
    memory[:, :vocab] = torch.from_numpy(logits).to(on)
    outputs = [
        guarded(rows, columns, kind, on)
        for rows, columns, kind in (
            (1, num_rows, torch.float32),
            (1, num_rows, torch.int32),
            (num_rows, most, torch.int32),
            (num_rows, most, torch.float32),
        )
    ]
    logprobs, ranks, top_ids, top_logprobs = (view for view, _ in outputs)
    ids, asked = (torch.tensor(values, dtype=torch.int32, device=on) for values in (tokens, counts))
    launchers.token_logprobs(memory[:, :vocab], ids, asked, logprobs[0], ranks[0], top_ids, top_logprobs)
    assert all(is_untouched_around(view, around) for view, around in outputs if view.numel() > 0)
    return StepOutput(
        token_ids=np.array(tokens, np.int32),
        logprobs=logprobs[0].cpu().numpy(),
        ranks=ranks[0].cpu().numpy(),
        top_ids=top_ids.cpu().numpy(),
        top_logprobs=top_logprobs.cpu().numpy(),
    )


def agree(found: StepOutput, want: StepOutput) -> bool:
    near = np.allclose(found.logprobs, want.logprobs, rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True)
    near &= np.allclose(found.top_logprobs, want.top_logprobs, rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True)
    return bool(near and (found.ranks == want.ranks).all() and (found.top_ids == want.top_ids).all())


def draw(seed: int, num_rows: int, vocab: int, most: int) -> tuple[Logits, StepOutput, list[int]]:
    """Rows that ask for any number of tokens or nothing, and what the reference says."""
    draws = np.random.default_rng(seed)
    logits, step = random_logits(draws, num_rows, vocab), random_step(draws, num_rows, vocab)
    step.num_logprobs[:] = draws.choice([-1, 0, 1, 5, 20, most], num_rows).clip(max=most)
    step.num_logprobs[-1] = most
    with np.errstate(invalid="ignore"):
        want = sample_step(logits, step)
    assert want.top_ids.shape[1] == most
    return logits, want, step.num_logprobs.tolist()


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("most", [1, 20, 40])
def test_agrees_with_the_reference(launchers: Launchers, vocab: int, most: int) -> None:
    seed = fresh_seed()
    logits, want, counts = draw(seed, 12, vocab, most)
    assert agree(run(launchers, logits, want.token_ids.tolist(), counts, most=most), want), f"seed={seed}"


@pytest.mark.parametrize("spread", [3.0, 1e-7])
def test_more_tokens_than_shared_memory_takes(launchers: Launchers, spread: float) -> None:
    """Of 20,011, the best 5 out of one bin of the histogram, and all of them."""
    seed, vocab = fresh_seed(), 20_011
    draws = np.random.default_rng(seed)
    logits = (draws.normal(size=(2, vocab)) * spread).astype(np.float32)
    logits[:, :9000] = logits[:, 9000:18000]  # ties
    step = random_step(draws, 2, vocab)
    step.num_logprobs[:] = [5, vocab]
    step.targets[:] = draws.integers(0, vocab, 2)
    want = sample_step(logits, step)
    found = run(launchers, logits, want.token_ids.tolist(), [5, vocab], most=vocab)
    assert agree(found, want), f"seed={seed}"


def test_rows_without_a_token_say_nothing(launchers: Launchers) -> None:
    logits = np.zeros((4, 40), np.float32)
    logits[1] = np.nan
    found = run(launchers, logits, [NO_TOKEN, NOT_FINITE, 3, 3], [2, 2, -1, 2], most=3)
    assert np.isnan(found.logprobs).tolist() == [True, True, True, False]
    assert found.ranks.tolist() == [0, 0, 0, 1]
    assert found.top_ids.tolist() == [[-1, -1, -1]] * 3 + [[0, 1, -1]]
    assert np.isnan(found.top_logprobs).sum() == 10


def test_nobody_asks_for_others(launchers: Launchers) -> None:
    found = run(launchers, np.zeros((2, 40), np.float32), [3, 4], [0, 0], most=0)
    np.testing.assert_allclose(found.logprobs, -np.log(40), rtol=1e-6)


def test_a_row_does_not_depend_on_the_others(launchers: Launchers) -> None:
    logits, want, _ = draw(fresh_seed(), 9, 1000, 20)
    tokens = want.token_ids.tolist()
    together = run(launchers, logits, tokens, [20] * 9, most=20)
    for row in range(9):
        alone = run(launchers, logits[row : row + 1], tokens[row : row + 1], [20], most=20)
        for name in ("logprobs", "top_logprobs"):
            assert getattr(alone, name).view(np.uint32).tolist() == getattr(together, name)[
                row : row + 1
            ].view(np.uint32).tolist()  # fmt: skip


def test_what_the_comparison_finds(launchers: Launchers) -> None:
    """A temperature, a token's neighbour, larger ids first among equals: none passes for the result."""
    seed = fresh_seed()
    logits = np.random.default_rng(seed).normal(size=(3, 257)).astype(np.float32)
    logits[:, 100:] = logits[:, 100:101] + 5
    step = random_step(np.random.default_rng(seed), 3, 257)
    step.targets[:], step.num_logprobs[:] = [7, 200, 50], 9
    want = sample_step(logits, step)
    tokens = want.token_ids.tolist()
    assert agree(run(launchers, logits, tokens, [9] * 3, most=9), want)
    for wrong, others in ((logits * np.float32(1.001), tokens), (logits, [8, 201, 51])):
        assert not agree(run(launchers, wrong, others, [9] * 3, most=9), want)
    want.top_ids[0, :2] = want.top_ids[0, 1::-1]
    assert not agree(run(launchers, logits, tokens, [9] * 3, most=9), want)


@pytest.mark.parametrize("wrong", ["logits", "token_ids", "logprobs", "top_logprobs"])
def test_a_tensor_that_does_not_fit_is_named(launchers: Launchers, wrong: str) -> None:
    on = launchers.device
    ids = torch.zeros(3, dtype=torch.int32, device=on)
    with pytest.raises(ValueError, match=f"^{wrong}: "):
        launchers.token_logprobs(
            torch.zeros((3, 40), device=on, dtype=torch.bfloat16 if wrong == "logits" else torch.float32),
            ids.long() if wrong == "token_ids" else ids,
            ids,
            torch.zeros(2 if wrong == "logprobs" else 3, device=on),
            ids,
            torch.zeros((3, 5), dtype=torch.int32, device=on),
            torch.zeros((3, 4 if wrong == "top_logprobs" else 5), device=on),
        )
