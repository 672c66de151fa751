"""Builds the `tokenizers` objects of a checkpoint, from its `tokenizer.json` or from a GGUF vocabulary.

Owns the encoders: `plain` never sees control tokens in text, `control` does, `chat` does too and drops `CONTROL_BREAK`.
They share one model (vocabulary and merges), so three cost no more than one. Invariant: all give every added token the
same id.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from llmserve.checkpoints.text_assets import TextAssets
from llmserve.errors import CheckpointError
from llmserve.text.control import CONTROL_BREAK
from llmserve.text.pretokenizers import pre_tokenizer_spec

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


@dataclass(frozen=True, slots=True)
class Encoders:
    """The encoders of one vocabulary and what the checkpoint's format says about their use."""

    plain: Tokenizer
    control: Tokenizer
    chat: Tokenizer
    byte_level: bool
    """Tokens are spelled in the byte alphabet; otherwise in SentencePiece's way."""
    strips_first_space: bool
    """Decoding drops one leading space."""
    added: dict[int, AddedToken]
    """Control and user-defined tokens by id."""


def build_encoders(assets: TextAssets) -> Encoders:
    """Raises CheckpointError when the vocabulary is inconsistent or of a kind that is not supported."""
    # One text at a time: the library's thread pool would add threads to busy cores, and nothing else.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if assets.tokenizer_json is not None:
        return _from_json(assets)
    if assets.vocab_model != "gpt2":
        raise CheckpointError(f"tokenizer.ggml.model {assets.vocab_model!r} is not supported yet; supported: gpt2")
    return _from_gguf(assets)


def _from_json(assets: TextAssets) -> Encoders:
    try:
        control = Tokenizer.from_file(str(assets.tokenizer_json))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{assets.tokenizer_json}: {error}") from error
    control.no_truncation()  # a file may carry the limits of its training set-up
    control.no_padding()
    decoder = repr(control.decoder)
    byte_level = "ByteLevel" in decoder
    if not byte_level and "ByteFallback" not in decoder and "Metaspace" not in decoder:
        raise CheckpointError(f"{assets.tokenizer_json}: decoder {decoder} is not supported yet")
    strips = not byte_level and ("Strip" in decoder or "Metaspace" in decoder)
    return _encoders(control, byte_level=byte_level, strips_first_space=strips)


def _from_gguf(assets: TextAssets) -> Encoders:
    spec = pre_tokenizer_spec(assets.pre)
    vocab = {token: i for i, token in enumerate(assets.tokens)}
    if assets.token_types and len(assets.token_types) != len(assets.tokens):
        raise CheckpointError(f"{len(assets.token_types)} token types for {len(assets.tokens)} tokens")
    try:
        merges = [(left, right) for left, right in (merge.split(" ", 1) for merge in assets.merges)]
        model = models.BPE(vocab, merges, ignore_merges=spec.ignore_merges)
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"the vocabulary's merges do not fit its tokens: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = spec.build()
    tokenizer.decoder = decoders.ByteLevel()
    if spec.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens(_added_tokens(assets))
    return _encoders(tokenizer, byte_level=True, strips_first_space=False)


def _added_tokens(assets: TextAssets) -> list[AddedToken]:
    kinds = (_UNKNOWN, _CONTROL, _USER_DEFINED)
    return [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(assets.tokens, assets.token_types, strict=False)
        if kind in kinds
    ]


def _encoders(control: Tokenizer, *, byte_level: bool, strips_first_space: bool) -> Encoders:
    plain, chat = _twin(control), _twin(control)
    plain.encode_special_tokens = True
    own = [control.normalizer] if control.normalizer is not None else []
    chat.normalizer = normalizers.Sequence([normalizers.Replace(CONTROL_BREAK, ""), *own])
    added = control.get_added_tokens_decoder()
    return Encoders(plain, control, chat, byte_level, strips_first_space, added)


def _twin(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer with settings of its own over the same model."""
    added = tokenizer.get_added_tokens_decoder()
    twin = Tokenizer(tokenizer.model)
    twin.normalizer = tokenizer.normalizer
    twin.pre_tokenizer = tokenizer.pre_tokenizer
    twin.post_processor = tokenizer.post_processor
    twin.decoder = tokenizer.decoder
    twin.add_tokens([added[i] for i in sorted(added)])
    assert twin.get_added_tokens_decoder().keys() == added.keys()  # the library numbers them by vocabulary and order
    return twin
