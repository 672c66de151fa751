"""The salt under which a request's prompt is cached: who may notice that somebody sent the same prompt before.

Invariant: two requests get the same salt exactly when tenant and `cache_salt` are the same (up to collisions of 64
keyed bits, which nobody outside can look for: the key is drawn at the start).
"""

from __future__ import annotations

import hashlib
import os

from llmserve.types import Request

_MAX_KNOWN = 4096


class CacheSalts:
    """Derives salts and remembers the recent ones."""

    def __init__(self) -> None:
        self._key = os.urandom(32)
        self._known: dict[tuple[str, str], int] = {}

    def of(self, request: Request) -> int:
        """64 bits, unsigned."""
        owner = request.tenant, request.cache_salt
        salt = self._known.get(owner)
        if salt is None:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            text = f"{len(request.tenant)}:{request.tenant}{request.cache_salt}"
            digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8, key=self._key).digest()
            salt = self._known[owner] = int.from_bytes(digest, "little")
        return salt
