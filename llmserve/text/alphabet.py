"""The two ways in which vocabularies spell bytes as text: the GPT-2 byte alphabet and SentencePiece pieces.

Owns nothing but the two mappings, token text → exact bytes. Source: OpenAI's GPT-2 release (byte alphabet), the
SentencePiece documentation (U+2581 for a space, `<0xNN>` for a byte without a piece).
"""

from __future__ import annotations

import re

_SPACE_MARK = "\u2581"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Character → byte. Printable Latin-1 bytes stand for themselves, the 68 others for U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """Bytes of a byte-level token; a text that leaves the alphabet is an added token and means itself."""
    try:
        return bytes([BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode()


def sentencepiece_bytes(token: str) -> bytes:
    """Bytes of a SentencePiece piece."""
    if match := _BYTE_PIECE.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace(_SPACE_MARK, " ").encode()
