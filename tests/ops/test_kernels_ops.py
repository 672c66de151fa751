"""Every op and every fusion of the CPU executor against the reference, for each instruction set and stored type."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest

from llmserve.ops.protocol import Executor
from tests.ops.bounds import op_bound
from tests.ops.networks import NETWORKS, QUANTIZED, WHOLE_SEQUENCES, WeightType
from tests.ops.op_running import (
    OpenCpuExecutor,
    cpu_logits,
    deviation,
    draw,
    executor_config,
    reference_logits,
)
from tests.ops.running import Piece, available_isas, make_step, new_sequence
from tests.ops.seeds import fresh_seed


def rounding(weight_type: WeightType, *, exact: bool) -> str:
    """What happens to activations before a matrix of such weights."""
    if exact:
        return "float32"
    return "int8" if weight_type in QUANTIZED else "bf16"


@pytest.mark.parametrize("weight_type", [*QUANTIZED, "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_agree_with_the_reference(name: str, weight_type: WeightType) -> None:
    network, seed = NETWORKS[name], fresh_seed()
    forward, token_ids = draw(network, seed, weight_type)
    expected = reference_logits(forward, token_ids)
    for isa in available_isas():
        for exact in (False, True):
            measured = cpu_logits(forward, token_ids, executor_config(isa, exact=exact))
            bound = op_bound(rounding(weight_type, exact=exact), gemms=network.gemms, attends=network.attends)
            found = deviation(measured, expected)
            assert bound.holds(found), f"{isa} exact={exact} seed={seed}: {found} exceeds {bound}"


def test_all_instruction_sets_agree_on_integers() -> None:
    """Integer sums are exact, so the tables may differ by the rounding of a few float operations only."""
    seed = fresh_seed()
    for weight_type in QUANTIZED:
        forward, token_ids = draw(NETWORKS["linear_bias_residual"], seed, weight_type)
        first, *others = (cpu_logits(forward, token_ids, executor_config(isa)) for isa in available_isas())
        for other in others:
            np.testing.assert_array_equal(first, other, err_msg=f"{weight_type} seed={seed}")


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("isa", available_isas())
def test_bidirectional_attention_takes_whole_sequences(isa: str, window: int) -> None:
    seed = fresh_seed()
    network = WHOLE_SEQUENCES["bidirectional", window]
    forward, token_ids = draw(network, seed, "bf16")
    expected = reference_logits(forward, token_ids)
    opened = OpenCpuExecutor(forward, executor_config(isa))
    handle = new_sequence(cast(Executor, opened.executor), len(token_ids))
    opened.executor.launch(make_step([Piece(handle, token_ids, 0)], num_logprobs=-1))
    bound = op_bound("bf16", gemms=network.gemms, attends=True)
    found = deviation(opened.logits(len(token_ids)), expected)
    assert bound.holds(found), f"{isa} seed={seed}: {found} exceeds {bound}"
    causal, _ = draw(WHOLE_SEQUENCES["causal", window], seed, "bf16")
    assert not bound.holds(deviation(reference_logits(causal, token_ids), expected)), f"seed={seed}: as if causal"
    with pytest.raises(ValueError, match="not whole in the step"):
        opened.executor.launch(make_step([Piece(handle, token_ids[1:], 1)], num_logprobs=-1))
