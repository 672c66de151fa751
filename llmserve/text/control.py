"""`CONTROL_BREAK`, the one convention between chat templates and tokenizers."""

from __future__ import annotations

CONTROL_BREAK = "\ufdd0"
"""A Unicode noncharacter that templates put into control-token look-alikes of a client's text. Encoders drop it after
looking for control tokens and before anything else, so the look-alike is encoded as the plain text it is."""
