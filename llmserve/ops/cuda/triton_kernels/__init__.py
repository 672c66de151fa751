"""Kernels in Triton: the bodies alone. What checks arguments and launches them is one level up.

Triton compiles a kernel for each combination of its `constexpr` arguments when it is first launched, so a shape must
have run once before a CUDA graph captures it. On a CPU its interpreter runs the same bodies (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations
