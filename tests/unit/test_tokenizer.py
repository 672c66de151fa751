"""The tokenizer on a made vocabulary: control tokens, BOS, byte spelling, cuts of each family, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from llmserve.checkpoints.text_assets import TextAssets
from llmserve.errors import CheckpointError, InvalidRequest
from llmserve.text import load_tokenizer
from llmserve.text.control import CONTROL_BREAK
from llmserve.text.pretokenizers import PRE_TOKENIZERS
from tests.unit.text_vocab import made_assets

TOKENIZER = load_tokenizer(made_assets())
UNICODE = st.text(st.characters(codec="utf-8"))


@given(UNICODE)
def test_text_round_trips_and_never_yields_control_tokens(text: str) -> None:
    text = text + "<|im_end|>" + text
    ids = TOKENIZER.encode(text, add_special=False)
    assert not TOKENIZER.control_ids.intersection(ids)
    assert TOKENIZER.decode(ids, skip_special=True) == text
    assert b"".join(map(TOKENIZER.token_bytes, ids)).decode() == text


@given(UNICODE)
def test_control_tokens_are_read_when_allowed(text: str) -> None:
    ids = TOKENIZER.encode(f"<|im_start|>{text}<|im_end|>", add_special=False, allow_control=True)
    assert ids[0] == 0
    assert ids[-1] == 1
    assert TOKENIZER.decode(ids, skip_special=True) == text.replace("<|im_start|>", "").replace("<|im_end|>", "")


def test_user_defined_tokens_are_always_read_and_never_skipped() -> None:
    ids = TOKENIZER.encode("<think>x", add_special=False)
    assert ids[0] == 3
    assert TOKENIZER.decode(ids, skip_special=True) == "<think>x"
    assert TOKENIZER.token_id("<think>") == 3


def test_merges_apply() -> None:
    ids = TOKENIZER.encode("hello w\u00e9", add_special=False)
    assert [TOKENIZER.token_bytes(i) for i in ids] == [b"hello", b" w", b"\xc3\xa9"]


def test_invalid_bytes_become_replacement_characters() -> None:
    ids = TOKENIZER.encode("\u20ac", add_special=False)
    assert TOKENIZER.decode(ids[:2], skip_special=True) == "\ufffd"
    assert TOKENIZER.decode([*ids[:2], *ids], skip_special=True) == "\ufffd\u20ac"


@pytest.mark.parametrize("token_id", [-1, 10**6, 2**40])
def test_ids_outside_the_vocabulary_have_no_bytes(token_id: int) -> None:
    assert TOKENIZER.token_bytes(token_id) == b""


def test_vocab_size_and_special_ids() -> None:
    assert TOKENIZER.vocab_size == 5 + 256 + 7
    assert TOKENIZER.bos_id == 2
    assert TOKENIZER.eos_id == 1
    assert TOKENIZER.control_tokens == ("<|im_start|>", "<|im_end|>", "<s>")


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        TOKENIZER.encode("a\ud800", add_special=False)


def test_special_frame_follows_the_file() -> None:
    both = load_tokenizer(made_assets(add_bos=True, add_eos=True))
    assert both.encode("h", add_special=True)[::2] == [2, 1]
    assert len(both.encode("h", add_special=False)) == 1
    assert len(TOKENIZER.encode("h", add_special=True)) == 1


def test_family_habit_holds_where_the_file_is_silent() -> None:
    assert load_tokenizer(made_assets("llama-bpe")).encode("h", add_special=True)[0] == 2
    assert len(load_tokenizer(made_assets("llama-bpe", add_bos=False)).encode("h", add_special=True)) == 1


@pytest.mark.parametrize("rendered", ["hello", "<s>hello", "<s><s>hello"])
def test_chat_has_one_bos(rendered: str) -> None:
    ids = load_tokenizer(made_assets(add_bos=True)).encode_chat(rendered)
    assert ids.count(2) == 1
    assert ids[0] == 2


def test_chat_has_no_bos_where_the_model_has_none() -> None:
    assert 2 not in TOKENIZER.encode_chat("hello")


def test_broken_control_tokens_are_plain_text_in_chat() -> None:
    ids = TOKENIZER.encode_chat(f"<|im_start|><{CONTROL_BREAK}|im_end|><|im_end|>")
    assert ids == [0, *TOKENIZER.encode("<|im_end|>", add_special=False), 1]


def test_eog_set_joins_all_sources() -> None:
    assets = made_assets(extra_eog_ids=(7,), generation_config={"eos_token_id": [9, 10]})
    assert load_tokenizer(assets).eog_ids == {1, 7, 9, 10}
    assert load_tokenizer(made_assets(eos_id=None, special_tokens={})).eog_ids == {1}
    assert load_tokenizer(made_assets(generation_config={"eos_token_id": 9})).eog_ids == {1, 9}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "no-such"}, "no-such"),
        ({"pre": ""}, "tokenizer.ggml.pre ''"),
        ({"vocab_model": "llama"}, "'llama' is not supported yet; supported: gpt2"),
        ({"merges": ["h zz"]}, "merges do not fit"),
        ({"merges": ["one"]}, "merges do not fit"),
        ({"token_types": [1]}, "1 token types for 268 tokens"),
    ],
)
def test_bad_vocabularies_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(made_assets(**changes))  # type: ignore[arg-type]


CUTS = {
    "gpt-2": "I|'m|\u2423IT|'|S|\u2423\u2423|\u24231234|\u2423a|!!|\n|\n|x|\u2423",
    "smollm": "I|'m|\u2423IT|'|S|\u2423\u2423\u2423|1|2|3|4|\u2423a|!!|\n|\n|x|\u2423",
    "llama-bpe": "I|'m|\u2423IT|'S|\u2423\u2423|\u2423|123|4|\u2423a|!!\n\n|x|\u2423",
    "qwen2": "I|'m|\u2423IT|'S|\u2423\u2423|\u2423|1|2|3|4|\u2423a|!!\n\n|x|\u2423",
    "tekken": "I|'m|\u2423IT|'S|\u2423\u2423|\u2423|1|2|3|4|\u2423a|!!\n\n|x|\u2423",
    "default": "I|'|m|\u2423IT|'|S|\u2423\u2423|\u2423|123|4|\u2423a|!!|\n|\n|x|\u2423",
}


@pytest.mark.parametrize("pre", CUTS)
def test_cuts_of_the_families(pre: str) -> None:
    cuts = PRE_TOKENIZERS[pre].build().pre_tokenize_str("I'm IT'S   1234 a!!\n\nx ")
    spaced = [decoders.ByteLevel().decode([piece]).replace(" ", "\u2423") for piece, _ in cuts]
    assert "|".join(spaced) == CUTS[pre]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_family_round_trips(pre: str) -> None:
    tokenizer = load_tokenizer(made_assets(pre))
    text = "I'm \u00e9t\u00e9 \u65e5\u672c 12345 \U0001f600\r\n\r\n  x()  \t <|im_end|> \u0663 hello"
    assert tokenizer.decode(tokenizer.encode(text, add_special=False), skip_special=False) == text


def test_normalization_of_qwen2() -> None:
    tokenizer = load_tokenizer(made_assets("qwen2"))
    assert tokenizer.encode("e\u0301", add_special=False) == tokenizer.encode("\u00e9", add_special=False)
    assert TOKENIZER.encode("e\u0301", add_special=False) != TOKENIZER.encode("\u00e9", add_special=False)


def _from_library(made: tokenizers.Tokenizer, folder: Path, **fields: object) -> TextAssets:
    file = folder / "tokenizer.json"
    made.save(str(file))
    return TextAssets(kind="hf", path=folder, tokenizer_json=file, **fields)  # type: ignore[arg-type]


def test_tokenizer_json_agrees_with_gguf(tmp_path: Path) -> None:
    assets = made_assets()
    vocab = {token: i for i, token in enumerate(assets.tokens)}
    made = tokenizers.Tokenizer(models.BPE(vocab, [(m.split()[0], m.split()[1]) for m in assets.merges]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>"])
    made.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    made.enable_truncation(4)
    made.enable_padding(length=16)
    loaded = load_tokenizer(_from_library(made, tmp_path, special_tokens=assets.special_tokens))
    text = "hello w\u00e9 <think> <|im_end|> 123 and quite some more"
    assert loaded.encode(text, add_special=False) == TOKENIZER.encode(text, add_special=False)
    assert loaded.encode(text, add_special=True)[0] == 2
    control = loaded.encode(text, add_special=False, allow_control=True)
    assert control == TOKENIZER.encode(text, add_special=False, allow_control=True)
    assert loaded.decode(control, skip_special=True) == TOKENIZER.decode(control, skip_special=True)
    assert loaded.bos_id == 2
    assert loaded.eog_ids == {1}
    assert loaded.vocab_size == TOKENIZER.vocab_size


def test_added_tokens_outside_the_model_keep_their_ids_in_every_encoder(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<z>", "<x>"])
    made.add_tokens(["<y>"])
    loaded = load_tokenizer(_from_library(made, tmp_path))
    assert loaded.encode("a<x><y><z>", add_special=False, allow_control=True) == [0, 3, 4, 2]
    assert loaded.encode_chat("a<x><y><z>") == [0, 3, 4, 2]
    assert loaded.encode("a<x><y><z>b", add_special=False) == [0, 4, 1]
    assert loaded.vocab_size == 5


def test_sentencepiece_style_tokenizer_json(tmp_path: Path) -> None:
    bytes_ = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **bytes_, "\u2581": 259, "h": 260, "i": 261, "hi": 262, "\u2581hi": 263}
    merges = [("h", "i"), ("\u2581", "hi")]
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    loaded = load_tokenizer(_from_library(made, tmp_path))
    ids = loaded.encode("hi hi \u00e9", add_special=False)
    assert ids[:2] == [263, 263]
    assert loaded.token_bytes(263) == b" hi"
    assert loaded.token_bytes(3 + 0xC3) == b"\xc3"
    assert loaded.decode(ids, skip_special=True) == made.decode(ids) == "hi hi \u00e9"
    assert loaded.eog_ids == {2}


def test_unreadable_tokenizer_json_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(TextAssets(kind="hf", path=tmp_path, tokenizer_json=file))


def test_unknown_decoder_is_refused(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    made.decoder = decoders.WordPiece()
    with pytest.raises(CheckpointError, match="WordPiece"):
        load_tokenizer(_from_library(made, tmp_path))
