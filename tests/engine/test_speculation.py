"""Drafts over the fake executor: what is accepted, what it costs in steps, blocks and budgets."""

from __future__ import annotations

from typing import Any

import pytest

from llmserve.config import EngineConfig
from llmserve.engine.drafter import SuffixDrafter
from llmserve.engine.engine import Engine
from llmserve.engine.loader import load_engine
from llmserve.engine.plan import Chunk, Plan, Verification
from llmserve.engine.sequence import Sequence
from llmserve.engine.speculation import _Candidate, _choose_lengths
from llmserve.engine.step_time import MAX_AGE, StepTimeModel
from llmserve.errors import InvalidRequest
from llmserve.types import Output
from tests.engine.fake_executor import FakeExecutor, next_token, score
from tests.engine.guesses import Guess, mixed, right, speculate, wrong
from tests.engine.test_engine import assert_nothing_held, expected_tokens, make_engine, make_request, run, tokens_of


def speculating(guess: Guess | None, *, max_draft_tokens: int = 4, **limits: Any) -> tuple[Engine, FakeExecutor]:
    engine, executor = make_engine(**limits)
    speculate(engine, guess, max_draft_tokens=max_draft_tokens)
    return engine, executor


@pytest.mark.parametrize(("guess", "num_steps"), [(right, 1 + 4), (wrong, 1 + 20)])
def test_right_drafts_save_steps_and_wrong_ones_change_nothing(guess: Guess, num_steps: int) -> None:
    engine, executor = speculating(guess)
    engine.submit(make_request("a", [1, 2, 3], max_tokens=21, seed=5))
    outputs = run(engine)["a"]
    assert tokens_of(outputs) == expected_tokens([1, 2, 3], 21, seed=5)
    assert [output.finish_reason for output in outputs] == [None] * (num_steps - 1) + ["length"]
    assert len(executor.steps) == num_steps
    assert_nothing_held(engine, executor)


def test_drafts_are_counted() -> None:
    engine, _ = speculating(lambda seq, n: [*right(seq, 2), *wrong(seq, n)[2:]])
    engine.submit(make_request("a", [1, 2, 3], max_tokens=1 + 3 * 4))
    run(engine)
    drafts = engine.stats().drafts
    # After the first token 12 are left: each step yields 3, and no draft goes past the end.
    assert (drafts.num_drafts, drafts.num_draft_tokens, drafts.num_accepted_tokens) == (4, 4 + 4 + 4 + 2, 8)
    assert drafts.num_accepted_per_position == (4, 4, 0, 0)
    assert engine.stats().num_generation_tokens == 13


def test_stop_token_within_a_draft_ends_the_sequence_there() -> None:
    expected = expected_tokens([5], 10)
    engine, executor = speculating(right, max_draft_tokens=6)
    engine.submit(make_request("a", [5], max_tokens=10, stop_token_ids=(expected[3],)))
    outputs = run(engine)["a"]
    assert tokens_of(outputs) == expected[: expected.index(expected[3]) + 1]
    assert (outputs[-1].finish_reason, outputs[-1].stop_token_id) == ("stop", expected[3])
    assert len(executor.steps[-1].token_ids) == 1 + 3, "what would follow a stop token is not drafted"
    assert_nothing_held(engine, executor)


def test_logprobs_of_accepted_tokens() -> None:
    engine, _ = speculating(mixed)
    engine.submit(make_request("a", [5, 6], max_tokens=20, num_logprobs=1))
    tokens, number = [5, 6], 0
    for output in run(engine)["a"]:
        assert output.logprobs is not None
        assert [entry.token_id for entry in output.logprobs] == list(output.token_ids)
        for entry in output.logprobs:
            assert entry.logprob == score(tokens, entry.token_id)
            tokens.append(entry.token_id)
            number += 1
    assert number == 20


@pytest.mark.parametrize("limits", [{"max_logit_rows": 9}, {"max_num_tokens": 10, "max_logit_rows": 8}])
def test_budgets_hold(limits: dict[str, int]) -> None:
    """The fake executor checks them; here all but one row are taken by decodes, or some are left."""
    engine, executor = speculating(right, **limits)
    for number in range(8):
        engine.submit(make_request(str(number), [number, 1], max_tokens=6 + number))
    outputs = run(engine)
    for number in range(8):
        assert tokens_of(outputs[str(number)]) == expected_tokens([number, 1], 6 + number)
    assert engine.stats().drafts.num_accepted_tokens > 0
    assert_nothing_held(engine, executor)


def test_no_drafts_beside_prompts() -> None:
    engine, executor = speculating(right, max_num_tokens=16)
    engine.submit(make_request("a", [1], max_tokens=30))
    engine.step()
    engine.submit(make_request("long", [9] * 60, max_tokens=1))
    num_before = len(executor.steps)
    for _ in range(4):
        engine.step()
    assert [len(step.logit_rows) for step in executor.steps[num_before:]] == [1, 1, 1, 2]
    outputs = run(engine)
    assert engine.stats().drafts.num_drafts > 0
    assert tokens_of(outputs["a"]) == expected_tokens([1], 30)[-len(tokens_of(outputs["a"])) :]


def test_drafts_take_no_block_that_others_may_need() -> None:
    engine, executor = speculating(right, num_blocks=5, max_draft_tokens=8)  # 4 tokens each
    for name in "ab":
        engine.submit(make_request(name, [1, 2, 3], max_tokens=6))
    engine.step()
    engine.step()
    assert engine.stats().num_blocks_used == 3, "one more for the first; then only as many are left as sequences run"
    run(engine)
    assert engine.stats().num_preemptions == 0
    assert_nothing_held(engine, executor)


def test_rejected_tokens_are_not_offered_to_others() -> None:
    """Full blocks of drafts that were wrong lie in the cache, unknown to the index."""
    engine, executor = speculating(wrong, max_draft_tokens=6)
    prompt = [1, 2, 3]
    engine.submit(make_request("a", prompt, max_tokens=9))
    answer = tokens_of(run(engine)["a"])
    known = [*prompt, *answer]
    first_wrong = [*known[:4], *wrong_after(known[:4], 4)]
    engine.submit(make_request("right", known, max_tokens=1))
    engine.submit(make_request("wrong", [*first_wrong, 1], max_tokens=1))
    outputs = run(engine)
    assert outputs["right"][0].num_cached_tokens == 8
    assert outputs["wrong"][0].num_cached_tokens == 4
    assert_nothing_held(engine, executor)


def wrong_after(tokens: list[int], count: int) -> list[int]:
    seq = type("Seq", (), {})()
    seq.token_ids, seq.num_tokens = memoryview(bytes(tokens)), len(tokens)
    seq.sampling = make_request("", [1]).sampling
    return wrong(seq, count)


def test_sequences_whose_sampling_remembers_tokens_are_not_drafted_for() -> None:
    pytest.importorskip("llmserve._C", reason="the extension is not built")
    engine, _ = speculating(right)
    engine.submit(make_request("a", [1, 2, 3], max_tokens=20, repetition_penalty=1.3))
    engine.submit(make_request("b", [1, 2, 3], max_tokens=20, min_tokens=5, stop_token_ids=(96,)))
    run(engine)
    assert engine.stats().drafts.num_drafts == 0


def test_a_failed_step_is_taken_apart_with_its_drafts() -> None:
    engine, executor = speculating(right, max_logit_rows=32)
    for number in range(5):
        engine.submit(make_request(str(number), [number], max_tokens=20, seed=number))
    outputs: dict[str, list[Output]] = {str(number): [] for number in range(5)}
    for output in [*engine.step(), *engine.step()]:
        outputs[output.request_id].append(output)
    assert len(executor.steps[-1].token_ids) == 5 * 5
    executor.poison = {3}
    for name, more in run(engine).items():
        outputs[name] += more
    assert "made to fail" in (outputs["3"][-1].error or "")
    for number in (0, 1, 2, 4):
        assert tokens_of(outputs[str(number)]) == expected_tokens([number], 20, seed=number)
    assert_nothing_held(engine, executor)


@pytest.mark.parametrize("counts", [(0, 2, 0), (1, 1, 0), (0, 3, 2), (2, 3, 1), (5, 1, 1), (1, 5, 0), (0, 1, 4)])
def test_halves_have_all_of_a_plan_in_order(counts: tuple[int, int, int]) -> None:
    names = iter(range(100))
    sequences: list[Any] = [[next(names) for _ in range(count)] for count in counts]
    plan = Plan(
        sequences[0], [Chunk(seq, 1, 0, True) for seq in sequences[2]], [Verification(seq, [1]) for seq in sequences[1]]
    )
    first, second = plan.halves()
    everything: list[Any] = list(range(sum(counts)))
    assert plan.sequences() == everything
    assert first.sequences() + second.sequences() == everything
    assert min(first.num_sequences, second.num_sequences) == sum(counts) // 2


def lengths_for(
    chances: list[list[float]], times: StepTimeModel, *, num_decodes: int, max_rows: int = 100
) -> list[int]:
    seq: Sequence = None  # type: ignore[assignment]  # not looked at
    candidates = [_Candidate(i, seq, SuffixDrafter(None), chance) for i, chance in enumerate(chances)]  # type: ignore[arg-type]
    return _choose_lengths(candidates, times, num_decodes, max_rows)


def measured(*, decode_s: float, num_decodes: int, draft_s: float) -> StepTimeModel:
    times = StepTimeModel()
    times.observe(num_decodes, 0, decode_s)
    for num_rows in range(num_decodes + 1, num_decodes + 64):
        times.observe_drafts(num_decodes, num_rows - num_decodes, decode_s + draft_s * (num_rows - num_decodes))
    return times


def test_a_row_must_bring_what_it_costs() -> None:
    falling = [0.9**number for number in range(1, 16)]
    cheap = measured(decode_s=0.010, num_decodes=1, draft_s=0.0001)
    dear = measured(decode_s=0.010, num_decodes=1, draft_s=0.005)
    assert lengths_for([falling], cheap, num_decodes=1) == [15]
    assert 1 <= lengths_for([falling], dear, num_decodes=1)[0] <= 4
    assert lengths_for([[0.3, 0.1]], dear, num_decodes=1) == [0]


def test_a_full_batch_drafts_only_what_is_nearly_certain() -> None:
    times = measured(decode_s=0.032, num_decodes=32, draft_s=0.0008)  # a decode takes 1 ms of the step
    unlikely = [[0.6, 0.4]] * 31
    assert lengths_for([*unlikely, [0.6, 0.4]], times, num_decodes=32) == [0] * 32
    likely = [[0.99**number for number in range(1, 16)]] * 31
    lengths = lengths_for([*likely, [0.6, 0.4]], times, num_decodes=32, max_rows=96)
    assert lengths[-1] == 0
    assert sum(lengths) == 96


def test_nothing_is_drafted_before_a_decode_was_measured() -> None:
    assert lengths_for([[0.99]], StepTimeModel(), num_decodes=1) == [0]


def test_drafts_cost_what_prompts_cost_until_they_were_measured() -> None:
    times = StepTimeModel()
    times.observe(1, 0, 0.010)
    times.observe(1, 100, 0.110)
    assert times.draft_token_s(4) == 0.0
    assert times.draft_token_s(5) == pytest.approx(0.001)
    times.observe_drafts(1, 7, 0.017)
    assert times.draft_token_s(8) == pytest.approx(0.001)
    times.observe_drafts(1, 3, 0.010)
    assert times.draft_token_s(4) == 0.0


def test_a_step_that_was_held_up_forbids_drafts_for_a_while_only() -> None:
    times = StepTimeModel()
    times.observe(1, 0, 0.010)
    times.observe_drafts(1, 3, 5.0)
    assert lengths_for([[0.9, 0.8, 0.7]], times, num_decodes=1) == [0]
    for _ in range(2 * MAX_AGE):
        times.observe(1, 0, 0.010)
    assert lengths_for([[0.9, 0.8, 0.7]], times, num_decodes=1) == [3]


@pytest.mark.parametrize("number", [0, 64])
def test_limits_of_the_option(number: int, tmp_path: Any) -> None:
    config = EngineConfig(model_path=tmp_path, max_draft_tokens=number)
    with pytest.raises(InvalidRequest, match="between 1 and 63"):
        load_engine(config, progress=lambda phase, done, total: None)


def test_repeated_text_is_drafted_for_by_the_engine_itself() -> None:
    """A prompt after which the fake network says what makes the end repeat itself: 8, 9, 5."""
    prompts = ([8, 9, 5, 30, 31, 32, *divmod(number, 97), 8, 9] for number in range(97**2))
    prompt = next(prompt for prompt in prompts if next_token(prompt) == 5)
    engine, executor = speculating(None, max_draft_tokens=3)
    engine.submit(make_request("a", prompt, max_tokens=10))
    outputs = run(engine)["a"]
    assert tokens_of(outputs) == expected_tokens(prompt, 10)
    assert executor.steps[1].token_ids.tolist() == [5, 30, 31, 32]
    assert_nothing_held(engine, executor)


def test_a_sequence_that_decodes_again_alone_has_its_new_blocks() -> None:
    """Nothing else decoded between its preemption and its next decode: arrays of the last decode must not be used."""
    engine, executor = speculating(None)
    engine.submit(make_request("a", [5, 6], max_tokens=8))
    outputs = [*engine.step(), *engine.step(), *engine.step()]
    engine._scheduler.preempt(engine._sequences["a"])
    outputs += run(engine)["a"]
    assert tokens_of(outputs) == expected_tokens([5, 6], 8)
    assert_nothing_held(engine, executor)
