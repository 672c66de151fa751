"""Sequences that wait for another one to compute the prompt they share (n > 1).

Invariant: a child is here only while its parent lives, was never preempted and has not computed its prompt; then it
queues like any other, and is admitted by a fork if its parent still has the prompt in its blocks.
"""

from __future__ import annotations

from llmserve.engine.sequence import NO_TABLE, Sequence


class ForkBook:
    """The children of each parent that must go first."""

    def __init__(self) -> None:
        self._children: dict[Sequence, list[Sequence]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, seq: Sequence) -> bool:
        """Keep a sequence until its parent has computed the prompt; False when there is nothing to wait for."""
        parent = seq.parent
        if parent is None or not _is_coming(parent):
            return False
        self._children.setdefault(parent, []).append(seq)
        self._length += 1
        return True

    def remove(self, seq: Sequence) -> bool:
        """Forget a sequence; says whether it was here."""
        siblings = self._children.get(seq.parent) if seq.parent is not None else None
        if siblings is None or seq not in siblings:
            return False
        siblings.remove(seq)
        self._length -= 1
        return True

    def take_ready(self) -> list[Sequence]:
        """The sequences that need not wait any longer, in order of arrival within a parent."""
        ready: list[Sequence] = []
        for parent in [parent for parent in self._children if not _is_coming(parent)]:
            ready += self._children.pop(parent)
        self._length -= len(ready)
        return ready


def can_fork(seq: Sequence) -> bool:
    """Whether its parent holds the computed prompt in its blocks now."""
    parent = seq.parent
    return (
        parent is not None
        and seq.num_tokens == seq.num_prompt_tokens > 1
        and parent.block_table != NO_TABLE
        and parent.num_computed_tokens >= parent.num_prompt_tokens
    )


def shares_prompt(seq: Sequence, parent: Sequence) -> bool:
    """Whether a sequence may be computed from the blocks of another: same prompt, same salt, nothing to score."""
    return (
        seq.reads_cache
        and seq.cache_salt == parent.cache_salt
        and seq.token_ids[: seq.num_prompt_tokens] == parent.token_ids[: parent.num_prompt_tokens]
    )


def _is_coming(parent: Sequence) -> bool:
    return not parent.ended and parent.num_preemptions == 0 and parent.num_computed_tokens < parent.num_prompt_tokens
