"""Lays buffers out in one arena: two buffers share bytes when no node needs both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmserve.ops.nodes import Buffer, Node


def lifetimes(nodes: Sequence[Node]) -> dict[Buffer, tuple[int, int]]:
    """First and last node, by index, that touches each buffer."""
    spans: dict[Buffer, tuple[int, int]] = {}
    for index, node in enumerate(nodes):
        for buffer in (*node.reads, *(out for out in (node.out, node.second_out) if out is not None)):
            spans[buffer] = (spans.get(buffer, (index, index))[0], index)
    return spans


def lay_out(nodes: Sequence[Node], size_of: Callable[[Buffer], int]) -> int:
    """Set every buffer's offset (first fit, in order of first use); returns the bytes of the arena."""
    spans = lifetimes(nodes)
    placed: list[tuple[Buffer, int]] = []  # (buffer, its bytes)
    total = 0
    for buffer, (first, last) in sorted(spans.items(), key=lambda item: item[1][0]):
        size = size_of(buffer)
        taken = sorted(
            (other.offset, other.offset + other_size)
            for other, other_size in placed
            if spans[other][0] <= last and first <= spans[other][1]
        )
        offset = 0
        for start, end in taken:
            if offset + size <= start:
                break
            offset = max(offset, end)
        buffer.offset = offset
        placed.append((buffer, size))
        total = max(total, offset + size)
    return total
