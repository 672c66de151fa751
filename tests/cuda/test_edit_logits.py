"""Edits of logits by every kind of launchers: bit for bit the reference's, and the sampler behind them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from llmserve.ops.reference_sampler import edit, sample_step, unpack_mask
from tests.ops.sampling_states import Twins, make_states, random_options
from tests.ops.seeds import fresh_seed

torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmserve.ops.cuda.launchers import Launchers
    from llmserve.ops.protocol import SamplingState, StepInput

from llmserve.ops.cuda.edits import Edits, build_edits, to_device, typical_ps  # noqa: E402
from llmserve.ops.cuda.sample import workspace_bytes  # noqa: E402
from tests.cuda.rows import guarded, is_untouched_around  # noqa: E402
from tests.cuda.sampling import VOCABS, Logits, device_rows, random_logits, random_step  # noqa: E402


class Case:
    """Rows with states, masks, both or neither, some of them scored; tokens were generated before."""

    def __init__(self, seed: int, num_rows: int, vocab: int) -> None:
        draws = np.random.default_rng(seed)
        self.logits = random_logits(draws, num_rows, vocab)
        self.step: StepInput = random_step(draws, num_rows, vocab)
        options = [random_options(draws, vocab) for _ in range(num_rows)]
        for own in options:
            if own and own.get("logit_bias") and draws.random() < 0.5:
                token = own["logit_bias"][0][0]  # named again: float32 adds in order
                own["logit_bias"] += [(token, 1e6), (token, -1e6), (token, 0.1)]
        prompts = [draws.integers(0, vocab, draws.integers(1, 9)).tolist() for _ in options]
        self.step.states, self.twins = make_states(options, vocab, prompts)
        for row, (state, twin) in enumerate(zip(self.step.states, self.twins, strict=True)):
            generated = draws.integers(0, vocab, draws.integers(0, 12)).tolist()
            self.step.sample_position[row] = len(prompts[row]) + len(generated)
            if state is None or twin is None:
                continue
            for token in generated:
                state.record(token)
                twin.record(token)
        words = -(-vocab // 32)
        self.step.masks = draws.integers(0, 2**32, (3, words), dtype=np.uint64).astype(np.uint32)
        self.step.mask_rows = draws.integers(-2, 3, num_rows).clip(min=-1).astype(np.int32)

    def edited(self, row: int) -> Logits:
        """By the definition, whatever is asked for."""
        logits, twin, mask = self.logits[row], self.twins[row], int(self.step.mask_rows[row])
        if twin is not None:
            logits = edit(logits, cast("SamplingState", twin))
        if mask >= 0:
            logits = np.where(unpack_mask(self.step.masks[mask], len(logits)), logits, np.float32(-np.inf))
        return np.asarray(logits)


def bits(values: NDArray[Any]) -> list[int]:
    """Of the numbers; which NaN and which zero it is does not matter."""
    return cast("list[int]", np.where(np.isnan(values), np.float32(np.nan), values + 0.0).view(np.uint32).tolist())


@pytest.mark.parametrize("vocab", VOCABS)
def test_edits_are_those_of_the_reference(launchers: Launchers, vocab: int) -> None:
    seed = fresh_seed()
    case = Case(seed, 16, vocab)
    edits = build_edits(case.step, vocab)
    assert edits is not None
    edited, memory = guarded(len(edits.rows), vocab, torch.float32, launchers.device, gap=vocab % 3)
    launchers.edit_logits(
        torch.from_numpy(case.logits).to(launchers.device), to_device(edits, launchers.device), edited
    )
    found = edited.cpu().numpy()
    with np.errstate(invalid="ignore"):
        for row, index in enumerate(edits.edited_rows.tolist()):
            if index >= 0:
                assert edits.rows[index] == row
                assert bits(found[index]) == bits(case.edited(row)), f"row {row} seed={seed}"
            elif case.step.targets[row] < 0:
                assert bits(case.logits[row]) == bits(case.edited(row)), f"row {row} seed={seed}: its edits are missing"
    edited.nan_to_num_(0.0).fill_(0.0)
    assert is_untouched_around(edited, memory)


@pytest.mark.parametrize("vocab", VOCABS)
def test_the_sampler_behind_them_agrees_with_the_reference(launchers: Launchers, vocab: int) -> None:
    seed, on, num_rows = fresh_seed(), launchers.device, 20
    case = Case(seed, num_rows, vocab)
    edits = build_edits(case.step, vocab)
    assert edits is not None
    logits = torch.from_numpy(case.logits).to(on)
    edited = torch.empty((len(edits.rows), vocab), device=on)
    launchers.edit_logits(logits, to_device(edits, on), edited)
    token_ids = torch.empty(num_rows, dtype=torch.int32, device=on)
    launchers.sample(
        logits,
        device_rows(case.step, on, typical_p=typical_ps(case.step)),
        token_ids,
        torch.empty(workspace_bytes(num_rows, vocab), dtype=torch.uint8, device=on),
        edited=edited,
        edited_rows=torch.from_numpy(edits.edited_rows).to(on),
    )
    case.step.states = cast("Sequence[SamplingState | None]", case.twins)
    with np.errstate(invalid="ignore", divide="ignore"):
        assert token_ids.tolist() == sample_step(case.logits, case.step).token_ids.tolist(), f"seed={seed}"


def test_rows_of_minus_one_are_left_alone(launchers: Launchers) -> None:
    case = Case(3, 8, 40)
    edits = build_edits(case.step, 40)
    assert edits is not None
    edits.rows[0] = -1
    edited = torch.full((len(edits.rows), 40), 7.0, device=launchers.device)
    launchers.edit_logits(
        torch.from_numpy(case.logits).to(launchers.device), to_device(edits, launchers.device), edited
    )
    assert (edited[0] == 7).all()
    assert not (edited[1] == 7).all()


# --- what the host makes ----------------------------------------------------------------------------------------------


def one_row(
    options: dict[str, Any] | None, *, prompt: Sequence[int] = (4,), target: int = -1
) -> tuple[StepInput, Twins]:
    step = random_step(np.random.default_rng(0), 1, 64)
    step.targets[:], step.sample_position[:] = target, len(prompt)
    step.states, twins = make_states([options], 64, [list(prompt)])
    return step, twins


@pytest.mark.parametrize("options", [None, {}, {"typical_p": 0.5}, {"stop_token_ids": [3]}])
def test_a_state_that_edits_nothing_costs_nothing(options: dict[str, Any] | None) -> None:
    assert build_edits(one_row(options)[0], 64) is None


def test_a_scored_row_has_no_edits() -> None:
    step, _ = one_row({"bad_words": [[1]], "typical_p": 0.5}, target=3)
    step.sample_position[:] = 0  # its state is not asked
    assert build_edits(step, 64) is None
    assert typical_ps(step) is None


def test_a_state_is_rewound_before_it_is_read() -> None:
    step, _ = one_row({"presence_penalty": 1.0})
    state = step.states[0]
    assert state is not None
    state.record(9)
    edits = build_edits(step, 64)
    assert edits is not None
    assert edits.tokens.tolist() == [4]
    assert state.token_ids == [4]
    step.sample_position[0] = 3
    with pytest.raises(ValueError, match="states"):
        build_edits(step, 64)


def test_rows_share_masks_and_allowed_tokens_make_their_own() -> None:
    step = random_step(np.random.default_rng(0), 4, 40)
    step.targets[:], step.sample_position[:] = -1, 1
    step.states, _ = make_states([None, {"allowed_token_ids": [0, 39]}, None, None], 40, [[1]] * 4)
    step.masks = np.array([[0, 0], [7, 0x80], [1, 1]], np.uint32)
    step.mask_rows = np.array([1, 1, 1, -1], np.int32)
    edits = build_edits(step, 40)
    assert edits is not None
    assert edits.edited_rows.tolist() == [0, 1, 2, -1]
    assert edits.mask_rows.tolist() == [0, 1, 0]
    assert edits.masks.tolist() == [[7, 0x80], [1, 0x80]]
    with pytest.raises(ValueError, match=r"^masks: "):
        build_edits(step, 70)


def test_typical_ps() -> None:
    step, _ = one_row({"typical_p": 0.25})
    values = typical_ps(step)
    assert values is not None
    assert values.tolist() == [0.25]
    step.states = ()
    assert typical_ps(step) is None


@pytest.mark.parametrize("wrong", ["logits", "edited", *sorted(set(Edits.__dataclass_fields__) - {"edited_rows"})])
def test_what_does_not_fit_is_named(launchers: Launchers, wrong: str) -> None:
    on = launchers.device
    case = Case(3, 8, 40)
    edits = build_edits(case.step, 40)
    assert edits is not None
    device = to_device(edits, on)
    edited = torch.empty((len(edits.rows), 40), device=on)
    logits = torch.from_numpy(case.logits).to(on)
    if wrong not in ("logits", "edited"):
        tensor = getattr(device, wrong)
        device = replace(device, **{wrong: tensor.double() if wrong != "tokens" else tensor.long()})
    with pytest.raises(ValueError, match=f"^{wrong}: "):
        launchers.edit_logits(
            logits.double() if wrong == "logits" else logits, device, edited[:1] if wrong == "edited" else edited
        )
