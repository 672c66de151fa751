"""The agreement test can fail: each wrong network is outside the bound of every executor arm, the loosest included."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmserve.checkpoints import open_checkpoint
from llmserve.ops import Forward
from tests.ops.bounds import tiny_bound
from tests.ops.golden import tiny_golden
from tests.ops.mutants import MUTANTS
from tests.ops.running import ARMS, build_executor, errors, prompt_logprobs
from tests.tiny import checkpoints
from tests.tiny.models import MODELS, VOCAB_SIZE

CASES = [(mutant, model) for mutant in MUTANTS for model in MUTANTS[mutant].models]


@pytest.mark.parametrize(("mutant", "name"), CASES)
def test_bounds_reject_the_mutant(mutant: str, name: str, tmp_path: Path) -> None:
    golden = tiny_golden(name)
    checkpoint = open_checkpoint(checkpoints.write(MODELS[name], tmp_path))
    config, tensors = MUTANTS[mutant].mutate(checkpoint.config, dict(checkpoint.tensors))
    forward: Forward = MUTANTS[mutant].build(config, tensors)
    executor = build_executor("reference", config, forward, num_tokens=64, num_blocks=64)
    measured = prompt_logprobs(executor, golden.prompt, chunks=(41,), vocab_size=VOCAB_SIZE)
    found = errors(measured[:, golden.ids], golden.logprobs)
    for arm in ARMS:
        bound = tiny_bound(MODELS[name], arm, spread=golden.spread)
        assert not bound.holds(found), f"{arm} would accept {mutant}: {found} is within {bound}"
