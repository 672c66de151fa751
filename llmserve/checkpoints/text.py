"""`open_text`: what a checkpoint says about text, for the frontend. The engine never loads it.

GGUF: the vocabulary and special tokens of the metadata. Hugging Face folder: the small JSON files beside the weights.
Invariant: no NumPy here and no loop over the vocabulary beyond the one decoding pass, since this is on the way to the
first token.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from llmserve.checkpoints import gguf
from llmserve.checkpoints.checkpoint import read_config
from llmserve.checkpoints.fields import Fields
from llmserve.checkpoints.mapping import MappedFile
from llmserve.checkpoints.safetensors import decode_json
from llmserve.checkpoints.text_assets import TextAssets
from llmserve.errors import CheckpointError, ModelNotFound

_SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_EXTRA_EOG: Final = ("eot", "eom")
_NO_TOKEN: Final = 0xFFFFFFFF
"""How some converters write that there is no such token."""
_SAMPLING: Final = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def open_text(path: Path) -> TextAssets:
    """Read the text side of a GGUF file or a Hugging Face folder. Raises `ModelNotFound`, `CheckpointError`."""
    if not path.exists():
        raise ModelNotFound(f"{path}: no such file or folder")
    return _open_folder(path) if path.is_dir() else _open_gguf(path)


def _open_gguf(path: Path) -> TextAssets:
    file = MappedFile(path)
    try:
        metadata = gguf.read_header(file, vocabulary=True, tensors=False).metadata
    finally:
        file.close()
    fields = Fields(metadata, path)
    arch = fields.text("general.architecture", "")
    tokens = fields.array("tokenizer.ggml.tokens", str)
    bos, eos, unk, pad = (_gguf_id(fields, name, len(tokens)) for name in ("bos", "eos", "unknown", "padding"))
    extra = [_gguf_id(fields, name, len(tokens)) for name in _EXTRA_EOG]
    special = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": pad}
    return TextAssets(
        kind="gguf",
        path=path,
        vocab_model=fields.text("tokenizer.ggml.model", ""),
        pre=fields.text("tokenizer.ggml.pre", ""),
        tokens=tokens,
        merges=fields.array("tokenizer.ggml.merges", str),
        token_types=fields.array("tokenizer.ggml.token_type", int),
        scores=fields.array("tokenizer.ggml.scores", float),
        bos_id=bos,
        eos_id=eos,
        unk_id=unk,
        pad_id=pad,
        extra_eog_ids=tuple(token for token in extra if token is not None and token != eos),
        add_bos=_optional_flag(fields, "tokenizer.ggml.add_bos_token"),
        add_eos=fields.flag("tokenizer.ggml.add_eos_token", default=False),
        add_space_prefix=fields.flag("tokenizer.ggml.add_space_prefix", default=False),
        special_tokens={name: tokens[token] for name, token in special.items() if token is not None},
        chat_template=fields.text("tokenizer.chat_template", "") or None,
        generation_config=_gguf_generation(metadata),
        architecture=arch,
        context_length=_optional_size(fields, f"{arch}.context_length"),
        name=fields.text("general.name", ""),
    )


def _gguf_id(fields: Fields, name: str, num_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    token = fields.values.get(key)
    if token is None or token == _NO_TOKEN:
        return None
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < num_tokens:
        raise fields.fail(f"{key} {token!r} is outside the vocabulary of {num_tokens} tokens")
    return token


def _optional_flag(fields: Fields, key: str) -> bool | None:
    return fields.flag(key, default=False) if fields.has(key) else None


def _optional_size(fields: Fields, key: str) -> int:
    return fields.size(key) if fields.has(key) else 0


def _gguf_generation(metadata: Mapping[str, Any]) -> dict[str, object]:
    """Sampling defaults that newer converters carry over from `generation_config.json`."""
    values = {name: metadata.get(f"general.sampling.{key}") for key, name in _SAMPLING.items()}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _open_folder(path: Path) -> TextAssets:
    tokenizer_json = path / "tokenizer.json"
    if not tokenizer_json.exists():
        raise CheckpointError(f"{path}: no tokenizer.json in this folder")
    config = read_config(path)
    tokenizer = _read_optional(path / "tokenizer_config.json")
    generation = _read_optional(path / "generation_config.json")
    special = _special_tokens(tokenizer, _read_optional(path / "special_tokens_map.json"))
    ids = _added_ids(tokenizer)
    fields = Fields(tokenizer, path / "tokenizer_config.json")
    bos, eos = _ids(config, "bos_token_id"), _ids(config, "eos_token_id")
    eos_id = ids.get(special.get("eos_token", ""), eos[0] if eos else None)
    eog = dict.fromkeys([*_ids(generation, "eos_token_id"), *eos])
    return TextAssets(
        kind="hf",
        path=path,
        tokenizer_json=tokenizer_json,
        bos_id=ids.get(special.get("bos_token", ""), bos[0] if bos else None),
        eos_id=eos_id,
        unk_id=ids.get(special.get("unk_token", "")),
        pad_id=ids.get(special.get("pad_token", "")),
        extra_eog_ids=tuple(token for token in eog if token != eos_id),
        add_bos=_optional_flag(fields, "add_bos_token"),
        add_eos=fields.flag("add_eos_token", default=False),
        add_space_prefix=fields.flag("add_prefix_space", default=False),
        special_tokens=special,
        chat_template=_chat_template(path, tokenizer),
        generation_config=generation,
        architecture=str(config.get("model_type", "")),
        context_length=_optional_size(Fields(config, path / "config.json"), "max_position_embeddings"),
        name=str(config.get("_name_or_path") or path.resolve().name),
    )


def _read_optional(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    values: dict[str, Any] = decode_json(path, path.read_bytes(), dict[str, Any])
    return values


def _ids(values: Mapping[str, Any], key: str) -> list[int]:
    """One id or a list of them."""
    value = values.get(key)
    found = value if isinstance(value, list) else [value]
    return [token for token in found if isinstance(token, int) and not isinstance(token, bool)]


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """A special token is a string or an object with `content`; earlier sources win."""
    tokens: dict[str, str] = {}
    for name in _SPECIAL:
        for source in sources:
            value = source.get(name)
            value = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(value, str):
                tokens.setdefault(name, value)
    return tokens


def _added_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    added = tokenizer.get("added_tokens_decoder")
    if not isinstance(added, Mapping):
        return {}
    pairs = ((token, entry.get("content")) for token, entry in added.items() if isinstance(entry, Mapping))
    return {content: int(token) for token, content in pairs if isinstance(content, str) and token.isdecimal()}


def _chat_template(path: Path, tokenizer: Mapping[str, Any]) -> str | None:
    """First of `chat_template.jinja`, `chat_template.json`, `tokenizer_config.json`; of named templates the default."""
    if (file := path / "chat_template.jinja").exists():
        try:
            return file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file}: not UTF-8") from error
    template = _read_optional(path / "chat_template.json").get("chat_template") or tokenizer.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)
    return template if isinstance(template, str) else None
