"""Networks. A model file says what is computed, against `ops.protocol.Ops` alone; executors decide how."""

from __future__ import annotations
