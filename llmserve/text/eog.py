"""The end-of-generation set: every token after which a model has finished its turn.

A checkpoint's `eos` alone is not enough: chat models end turns with tokens of their own, and base and chat variants
of one vocabulary differ in which they name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from llmserve.checkpoints.text_assets import TextAssets

END_OF_TURN_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|eot|>",
    "<|return|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<|END_OF_TURN_TOKEN|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<EOT>",
    "</s>",
    "<eos>",
)


def _ids(value: object) -> Iterable[int]:
    """Ids out of a generation config's `eos_token_id`, which is an int, a list of ints or absent."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return (item for item in values if isinstance(item, int) and not isinstance(item, bool))


def eog_ids(assets: TextAssets, control_id: Callable[[str], int | None]) -> frozenset[int]:
    """All end-of-generation ids. `control_id` gives the id of an added token by its text, None if there is none."""
    ids = {*assets.extra_eog_ids, *_ids(assets.eos_id), *_ids(assets.generation_config.get("eos_token_id"))}
    names = (*END_OF_TURN_TOKENS, assets.special_tokens.get("eos_token", ""))
    ids.update(token_id for name in names if (token_id := control_id(name)) is not None)
    return frozenset(ids)
