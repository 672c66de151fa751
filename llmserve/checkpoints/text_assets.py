"""`TextAssets`: what a checkpoint says about text, as plain data.

Owns no behaviour: `checkpoints.open_text` fills it, `llmserve.text` builds tokenizer and template from it.
Invariant: nothing here is derived or repaired; a field the checkpoint does not have keeps its default.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class TextAssets:
    """Vocabulary, special tokens, chat template and generation defaults of one checkpoint."""

    kind: Literal["gguf", "hf"]
    path: Path
    tokenizer_json: Path | None = None
    """A Hugging Face `tokenizer.json`; preferred over the vocabulary fields when present."""
    vocab_model: str = ""
    """GGUF `tokenizer.ggml.model`, e.g. `gpt2`."""
    pre: str = ""
    """GGUF `tokenizer.ggml.pre`: the pre-tokenizer's name."""
    tokens: list[str] = field(default_factory=list)
    """Token texts by id, byte-level tokens in the byte-level alphabet."""
    merges: list[str] = field(default_factory=list)
    """`left right` pairs, best first."""
    token_types: list[int] = field(default_factory=list)
    """1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""
    scores: list[float] = field(default_factory=list)
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    extra_eog_ids: tuple[int, ...] = ()
    """More end-of-generation ids that the checkpoint names (GGUF `eot_token_id`, `eom_token_id`, …)."""
    add_bos: bool | None = None
    """None: the checkpoint does not say, and the tokenizer family's own habit holds."""
    add_eos: bool = False
    add_space_prefix: bool = False
    special_tokens: dict[str, str] = field(default_factory=dict)
    """`bos_token`, `eos_token`, … → text, as chat templates expect them."""
    chat_template: str | None = None
    generation_config: dict[str, object] = field(default_factory=dict)
    """`temperature`, `top_p`, `eos_token_id`, …; empty when the checkpoint has none."""
    architecture: str = ""
    context_length: int = 0
    """Tokens; 0 when unknown."""
    name: str = ""
