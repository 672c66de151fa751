"""`Tokenizer`: text ↔ token ids of one checkpoint.

Invariants: text of a user is never read as control tokens unless the caller asks for it; `decode` is the joined
`token_bytes`, so it agrees with the incremental detokenizer byte for byte; thread-safe (nothing changes but a cache).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmserve.checkpoints.text_assets import TextAssets
from llmserve.errors import InvalidRequest
from llmserve.text.alphabet import byte_level_bytes, sentencepiece_bytes
from llmserve.text.eog import eog_ids
from llmserve.text.pretokenizers import PRE_TOKENIZERS

if TYPE_CHECKING:
    import tokenizers

    from llmserve.text.build import Encoders


class Tokenizer:
    """Made by `load_tokenizer`."""

    def __init__(self, assets: TextAssets, encoders: Encoders) -> None:
        self._plain = encoders.plain
        self._control = encoders.control
        self._chat = encoders.chat
        self._spell = byte_level_bytes if encoders.byte_level else sentencepiece_bytes
        self._strips_first_space = encoders.strips_first_space
        self._added_bytes = {i: token.content.encode() for i, token in encoders.added.items()}
        self._added_ids = {token.content: i for i, token in encoders.added.items()}
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str | None] = {}
        control = {i: token.content for i, token in encoders.added.items() if token.special}
        self.control_ids: frozenset[int] = frozenset(control)
        self.control_tokens: tuple[str, ...] = tuple(control.values())
        """Texts of the control tokens."""
        self.vocab_size: int = len(assets.tokens) or encoders.plain.get_vocab_size()
        self.bos_id: int | None = self._bos(assets)
        self.eos_id: int | None = assets.eos_id
        self.eog_ids: frozenset[int] = eog_ids(assets, self._added_ids.get)
        """Every token that ends a generation."""
        self._prefix, self._suffix = self._frame(assets)

    def encode(self, text: str, *, add_special: bool, allow_control: bool = False) -> list[int]:
        """Token ids of a text.

        `add_special` puts BOS and EOS around it where the checkpoint wants them; `allow_control` reads control tokens
        in the text as such. Raises InvalidRequest for text that is not Unicode (lone surrogates).
        """
        ids = self._ids(self._control if allow_control else self._plain, text)
        return [*self._prefix, *ids, *self._suffix] if add_special else ids

    def encode_chat(self, rendered: str) -> list[int]:
        """Ids of a rendered chat template: control tokens are read as such, BOS comes first once, never twice."""
        ids = self._ids(self._chat, rendered)
        bos = self.bos_id
        if bos is None:
            return ids
        if ids[:2] == [bos, bos]:
            return ids[1:]
        return ids if bos not in self._prefix or ids[:1] == [bos] else [bos, *ids]

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        skipped = self.control_ids if skip_special else frozenset()
        text = b"".join([self.token_bytes(i) for i in ids if i not in skipped]).decode("utf-8", "replace")
        return text[1:] if self._strips_first_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of a token; a control token gives its text, an id outside the vocabulary nothing."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._compute_bytes(token_id)
        return found

    def token_text(self, token_id: int) -> str | None:
        """`token_bytes` as text; None where they are not UTF-8 by themselves."""
        try:
            return self._texts[token_id]
        except KeyError:
            data = self.token_bytes(token_id)
        try:
            text: str | None = data.decode()
        except UnicodeDecodeError:
            text = None
        self._texts[token_id] = text
        return text

    def token_id(self, text: str) -> int | None:
        """Id of a control or user-defined token by its text."""
        return self._added_ids.get(text)

    def _compute_bytes(self, token_id: int) -> bytes:
        if token_id in self._added_bytes:
            return self._added_bytes[token_id]
        text = self._plain.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        return b"" if text is None else self._spell(text)

    @staticmethod
    def _ids(encoder: tokenizers.Tokenizer, text: str) -> list[int]:
        # `encode` keeps the interpreter's lock, so that on a thread it would hold up the event loop all the same; this
        # one lets go of it, and is a quarter faster because it works out no offsets.
        try:
            return encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequest("text is not valid Unicode: it holds a lone surrogate") from error

    def _bos(self, assets: TextAssets) -> int | None:
        if assets.bos_id is not None:
            return assets.bos_id
        return self._added_ids.get(assets.special_tokens.get("bos_token", ""))

    def _frame(self, assets: TextAssets) -> tuple[list[int], list[int]]:
        """What goes before and after a text: by a tokenizer.json's post-processor, or by a GGUF file's flags."""
        if assets.tokenizer_json is not None:
            bare, framed = (self._plain.encode("x", add_special_tokens=special).ids for special in (False, True))
            starts = range(len(framed) - len(bare), -1, -1)
            first = next(start for start in starts if framed[start : start + len(bare)] == bare)
            return framed[:first], framed[first + len(bare) :]
        spec = PRE_TOKENIZERS.get(assets.pre)
        add_bos = assets.add_bos if assets.add_bos is not None else spec is not None and spec.add_bos
        prefix = [self.bos_id] if add_bos and self.bos_id is not None else []
        return prefix, [assets.eos_id] if assets.add_eos and assets.eos_id is not None else []


def load_tokenizer(assets: TextAssets) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises CheckpointError when its vocabulary is unsupported or inconsistent."""
    from llmserve.text.build import build_encoders  # the library is imported when it is needed

    return Tokenizer(assets, build_encoders(assets))
