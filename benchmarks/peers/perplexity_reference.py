"""Log-probabilities in float32 on dequantized weights, for `benchmarks.peers.perplexity`. Needs torch and transformers.

    PYTHON perplexity_reference.py MODEL.gguf WINDOWS.json NUM_SCORED OUT.json

WINDOWS: lists of token ids. OUT: the log-probabilities of the last NUM_SCORED tokens of each. One thread: it waits for
no other one on a machine that is not quiet.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers


def main() -> None:
    """Compute and write."""
    model, windows, out = (Path(sys.argv[index]).resolve() for index in (1, 2, 4))
    num_scored = int(sys.argv[3])
    torch.set_num_threads(1)
    network = transformers.AutoModelForCausalLM.from_pretrained(
        model.parent, gguf_file=model.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    told = []
    for token_ids in json.loads(windows.read_text()):
        with torch.no_grad():
            logits = network(torch.tensor([token_ids[:-1]]), logits_to_keep=num_scored).logits[0]
        chosen = logits.gather(1, torch.tensor(token_ids[-num_scored:])[:, None])[:, 0].double()
        told.append((chosen - torch.logsumexp(logits.double(), -1)).tolist())
    out.write_text(json.dumps(told))


if __name__ == "__main__":
    main()
