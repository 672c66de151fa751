"""`open_text`: the text side of both formats, without NumPy and without the tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest

from llmserve.checkpoints import open_text
from llmserve.errors import CheckpointError, ModelNotFound
from tests.unit.checkpoint_files import hf_config, write_gguf


def test_text_of_a_gguf_file(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_name("Tiny")
        writer.add_eot_token_id(3)
        writer.add_eom_token_id(4)
        writer.add_unk_token_id(0)
        writer.add_add_bos_token(True)
        writer.add_add_space_prefix(True)
        writer.add_chat_template("{{ messages }}")
        writer.add_token_scores([0.5] * 40)

    text = open_text(write_gguf(tmp_path / "m.gguf", edit=edit))
    assert (text.kind, text.vocab_model, text.pre, text.name) == ("gguf", "gpt2", "smollm", "Tiny")
    assert text.tokens == [f"tök{i}" for i in range(40)]
    assert (text.token_types, text.merges, text.scores) == ([1] * 40, ["a b", "ab c"], [0.5] * 40)
    assert (text.bos_id, text.eos_id, text.unk_id, text.pad_id, text.extra_eog_ids) == (1, 2, 0, None, (3, 4))
    assert (text.add_bos, text.add_eos, text.add_space_prefix) == (True, False, True)
    assert text.special_tokens == {"bos_token": "tök1", "eos_token": "tök2", "unk_token": "tök0"}
    assert (text.chat_template, text.architecture, text.context_length) == ("{{ messages }}", "llama", 128)


def test_missing_fields_keep_their_defaults(tmp_path: Path) -> None:
    text = open_text(write_gguf(tmp_path / "m.gguf"))
    assert (text.chat_template, text.scores, text.extra_eog_ids, text.generation_config) == (None, [], (), {})
    assert text.add_bos is None


def test_token_id_outside_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"eot_token_id 40 is outside the vocabulary of 40 tokens"):
        open_text(write_gguf(tmp_path / "m.gguf", edit=lambda w: w.add_eot_token_id(40)))
    absent = open_text(write_gguf(tmp_path / "n.gguf", edit=lambda w: w.add_eot_token_id(0xFFFFFFFF)))
    assert absent.extra_eog_ids == ()


def test_ill_typed_metadata(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.chat_template is 7, not a string"):
        open_text(write_gguf(tmp_path / "m.gguf", edit=lambda w: w.add_uint32("tokenizer.chat_template", 7)))


def _folder(folder: Path, **files: Any) -> Path:
    folder.mkdir()
    content = {"config": hf_config(bos_token_id=1, eos_token_id=[2, 5]), "tokenizer": {"model": {}}, **files}
    for name, value in content.items():
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


TOKENIZER_CONFIG = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False},
    "add_bos_token": True,
    "added_tokens_decoder": {"7": {"content": "<s>"}, "8": {"content": "</s>"}},
    "chat_template": "A",
}


def test_text_of_a_folder(tmp_path: Path) -> None:
    generation = {"eos_token_id": [8, 9], "temperature": 0.6, "top_p": 0.9}
    folder = _folder(tmp_path / "m", tokenizer_config=TOKENIZER_CONFIG, generation_config=generation)
    text = open_text(folder)
    assert (text.kind, text.tokenizer_json, text.chat_template) == ("hf", folder / "tokenizer.json", "A")
    assert (text.bos_id, text.eos_id, text.extra_eog_ids) == (7, 8, (9, 2, 5))
    assert text.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert (text.add_bos, text.add_eos, text.architecture, text.context_length) == (True, False, "llama", 128)
    assert text.generation_config == generation


def test_ids_fall_back_to_the_configuration(tmp_path: Path) -> None:
    text = open_text(_folder(tmp_path / "m"))
    assert (text.bos_id, text.eos_id, text.extra_eog_ids, text.chat_template) == (1, 2, (5,), None)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}], "D"),
        ([{"name": "only", "template": "O"}], "O"),
        ([{"name": "a", "template": "A"}, {"name": "b", "template": "B"}], None),
        (None, None),
    ],
)
def test_named_chat_templates(tmp_path: Path, template: object, expected: str | None) -> None:
    folder = _folder(tmp_path / "m", tokenizer_config={"chat_template": template})
    assert open_text(folder).chat_template == expected


def test_a_jinja_file_wins(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "m", tokenizer_config=TOKENIZER_CONFIG)
    (folder / "chat_template.jinja").write_text("J\n")
    assert open_text(folder).chat_template == "J\n"


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        open_text(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        open_text(_folder(tmp_path / "m", tokenizer=None))
    broken = _folder(tmp_path / "b")
    (broken / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not usable JSON"):
        open_text(broken)


def test_the_text_side_does_not_load_numpy() -> None:
    code = "import sys, llmserve.checkpoints; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
