"""Regenerate tests/data/tiny_models_golden.npz: log-probabilities of transformers in float32 for every tiny network.

Runs in the reference environment (torch, transformers, gguf; see requirements/reference.in), from the root:

    PYTHONPATH=. python scripts/make_model_golden.py

Per network NAME the file holds `NAME.sha256` (of the stored weights), `NAME.prompt` [T], `NAME.ids` [N] and
`NAME.logprobs` [T, N] in float32: row t is the distribution after prompt[: t + 1].
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.tiny import checkpoints, models

GOLDEN = Path(__file__).parent.parent / "tests" / "data" / "tiny_models_golden.npz"
MIN_LOGIT_STD = 2.0


def logits_of(model: models.TinyModel, tensors: dict[str, models.Array]) -> Any:
    """All logits of the model's prompt, [T, vocab], float64."""
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoints.write_folder(model, Path(folder), tensors)
        network = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        )
    missing = set(network.state_dict()) - set(tensors) - {"lm_head.weight"}
    assert not missing, f"{model.name}: transformers made up {missing}"
    with torch.no_grad():
        return network.eval()(torch.tensor([models.prompt_ids(model)])).logits[0].double()


def main() -> None:
    """Compute and write all golden values."""
    transformers.logging.set_verbosity_error()
    golden: dict[str, Any] = {}
    for name, model in models.MODELS.items():
        tensors = checkpoints.stored_tensors(model)
        logits = logits_of(model, tensors)
        std = float(logits.std())
        assert std >= MIN_LOGIT_STD, f"{name}: the logits' standard deviation is {std:.2f}"
        ids = models.scored_ids(model)
        golden[f"{name}.sha256"] = np.array(models.digest(tensors))
        golden[f"{name}.prompt"] = np.array(models.prompt_ids(model), np.int16)
        golden[f"{name}.ids"] = np.array(ids, np.int16)
        golden[f"{name}.logprobs"] = torch.log_softmax(logits, -1)[:, ids].numpy().astype(np.float32)
        print(f"{name}: logit std {std:.2f}")
    np.savez_compressed(GOLDEN, **golden)
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size} bytes, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
