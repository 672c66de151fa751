"""Regenerate tests/data/smollm2_golden.json: log-probabilities of transformers for the default model.

transformers dequantizes the GGUF file to float32 and runs it on torch. Runs in the reference environment:

    PYTHONPATH=. python scripts/make_smollm2_golden.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf

Per prompt: `token_ids`, `logprobs` (of each token from the second on, given those before it), `top_ids` (the most
likely token after each token, the last included) and `top_logprobs` (theirs).
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

DATA = Path(__file__).parent.parent / "tests" / "data"
GOLDEN = DATA / "smollm2_golden.json"


def prompts(tokenizer: Any) -> list[list[int]]:
    """Token ids of all prompts: chats through the checkpoint's template, texts as they are."""
    source = json.loads((DATA / "smollm2_prompts.json").read_text())
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for text in source["chats"]
    ]
    return chats + [tokenizer(text).input_ids for text in source["texts"]]


def score(network: Any, token_ids: list[int]) -> dict[str, Any]:
    """Golden values of one prompt."""
    with torch.no_grad():
        logits = network(torch.tensor([token_ids])).logits[0].double()
    logprobs = torch.log_softmax(logits, -1)
    following = logprobs[:-1].gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
    return {
        "token_ids": token_ids,
        "logprobs": [round(value, 5) for value in following.tolist()],
        "top_ids": logits.argmax(-1).tolist(),
        "top_logprobs": [round(value, 5) for value in logprobs.max(-1).values.tolist()],
    }


def main() -> None:
    """Compute and write all golden values."""
    path = Path(sys.argv[1]).resolve()
    source = {"gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **source)
    network = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, **source, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    golden = {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "transformers": transformers.__version__,
        "prompts": [score(network, token_ids) for token_ids in prompts(tokenizer)],
    }
    GOLDEN.write_text(json.dumps(golden, separators=(",", ":")).replace('{"token_ids"', '\n{"token_ids"') + "\n")
    lengths = [len(entry["token_ids"]) for entry in golden["prompts"]]
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size} bytes, {len(lengths)} prompts, {sorted(lengths)} tokens")


if __name__ == "__main__":
    main()
