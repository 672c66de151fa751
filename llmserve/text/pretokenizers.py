"""How text is cut before byte-pair merging, by the name a GGUF file gives (`tokenizer.ggml.pre`).

Owns the table of those names. A name that is missing here is an error, never a default: a wrong cut gives plausible
but wrong token ids. The expressions are the ones of the models' own published tokenizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmserve.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = _WORDS + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN2 = _WORDS + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)


@dataclass(frozen=True, slots=True)
class PreTokenizerSpec:
    """One family's way to cut text."""

    splits: tuple[str, ...]
    """Expressions applied one after the other, each to the pieces the former ones left."""
    nfc: bool = False
    """Text is brought to Unicode NFC first."""
    ignore_merges: bool = False
    """A piece that is a token as a whole is not merged up from bytes."""
    add_bos: bool = False
    """The family's habit where the file does not say."""

    def build(self) -> PreTokenizer:
        """The `tokenizers` object, byte alphabet included."""
        from tokenizers import Regex, pre_tokenizers

        steps: list[PreTokenizer] = [pre_tokenizers.Split(Regex(split), "isolated") for split in self.splits]
        return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_DIGITS_GPT2 = PreTokenizerSpec((r"\p{N}", _GPT2))
_LLAMA3_SPEC = PreTokenizerSpec((_LLAMA3,), ignore_merges=True, add_bos=True)

PRE_TOKENIZERS: dict[str, PreTokenizerSpec] = {
    "default": PreTokenizerSpec((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizerSpec((_GPT2,)),
    "phi-2": PreTokenizerSpec((_GPT2,)),
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,
    "command-r": PreTokenizerSpec(_DIGITS_GPT2.splits, nfc=True),
    "llama-bpe": _LLAMA3_SPEC,
    "llama3": _LLAMA3_SPEC,
    "llama-v3": _LLAMA3_SPEC,
    "falcon3": _LLAMA3_SPEC,
    "lfm2": _LLAMA3_SPEC,
    "qwen2": PreTokenizerSpec((_QWEN2,), nfc=True),
    "deepseek-r1-qwen": PreTokenizerSpec((_QWEN2,)),
    "tekken": PreTokenizerSpec((_TEKKEN,), ignore_merges=True, add_bos=True),
    "deepseek-coder": PreTokenizerSpec(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
    ),
}


def pre_tokenizer_spec(name: str) -> PreTokenizerSpec:
    """The entry of this name. Raises CheckpointError naming an unknown one."""
    spec = PRE_TOKENIZERS.get(name)
    if spec is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise CheckpointError(f"tokenizer.ggml.pre {name!r} is not supported yet; supported: {known}")
    return spec
