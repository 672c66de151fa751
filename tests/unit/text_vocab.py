"""A made byte-level vocabulary for the tests of `llmserve.text`: all bytes, some merges, control and user tokens."""

from __future__ import annotations

from pathlib import Path

from llmserve.checkpoints.text_assets import TextAssets
from llmserve.text.alphabet import BYTE_OF

CONTROL = ("<|im_start|>", "<|im_end|>", "<s>")
USER_DEFINED = ("<think>", "  \n")
MERGES = ("h e", "l l", "he ll", "hell o", "\u0120 w", "1 2", "\u00c3 \u00a9")


def made_assets(pre: str = "gpt-2", **changes: object) -> TextAssets:
    """Ids: 0–2 control, 3–4 user-defined, 5–260 bytes in alphabet order, then the merges."""
    merged = [merge.replace(" ", "") for merge in MERGES]
    tokens = [*CONTROL, *USER_DEFINED, *sorted(BYTE_OF), *merged]
    types = [3] * len(CONTROL) + [4] * len(USER_DEFINED) + [1] * (len(tokens) - 5)
    fields: dict[str, object] = {
        "vocab_model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "merges": list(MERGES),
        "token_types": types,
        "bos_id": tokens.index("<s>"),
        "eos_id": tokens.index("<|im_end|>"),
        "special_tokens": {"bos_token": "<s>", "eos_token": "<|im_end|>"},
    }
    return TextAssets(kind="gguf", path=Path("made.gguf"), **(fields | changes))  # type: ignore[arg-type]
