"""One step's work: whole decodes, verifications and cut chunks.

Rows of a step are ordered as its plan: all decodes first, then all verifications, each with the row of its last token
before those of its drafts, then all chunks, each chunk's scored positions before the one it samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmserve.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence in a step that is not a plain decode."""

    seq: Sequence
    num_tokens: int
    num_score_rows: int
    """Logit rows that score prompt tokens."""
    samples: bool
    """Whether the last token's row samples the next token."""


@dataclass(frozen=True, slots=True)
class Verification:
    """A decode with drafts behind it: one row for the last token and one for each draft."""

    seq: Sequence
    draft_ids: list[int]
    """What the sequence is guessed to go on with; at least one."""

    @property
    def num_rows(self) -> int:
        return 1 + len(self.draft_ids)


@dataclass(slots=True)
class Plan:
    """One step's work. Rows of the step: all decodes in order, then all verifications, then all chunks."""

    decodes: list[Sequence] = field(default_factory=list)
    """Sequences with one token to compute and one to sample."""
    chunks: list[Chunk] = field(default_factory=list)
    verifications: list[Verification] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + len(self.verifications) + self.num_draft_tokens + self.num_chunk_tokens

    @property
    def num_draft_tokens(self) -> int:
        return sum(len(verification.draft_ids) for verification in self.verifications)

    @property
    def num_chunk_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def chunk_context(self) -> int:
        """Tokens before a token of the chunks, on average; before the step has advanced anything."""
        pairs = sum(chunk.num_tokens * (chunk.seq.num_computed_tokens + chunk.num_tokens // 2) for chunk in self.chunks)
        return pairs // self.num_chunk_tokens if self.chunks else 0

    @property
    def num_rows(self) -> int:
        chunk_rows = sum(chunk.num_score_rows + chunk.samples for chunk in self.chunks)
        return self.num_tokens - self.num_chunk_tokens + chunk_rows

    @property
    def num_sequences(self) -> int:
        return len(self.decodes) + len(self.verifications) + len(self.chunks)

    def sequences(self) -> list[Sequence]:
        """All sequences of the step, in row order."""
        return [*self.decodes, *(part.seq for part in self.verifications), *(part.seq for part in self.chunks)]

    def halves(self) -> tuple[Plan, Plan]:
        """The same work as two steps, each with at least one of the sequences of a plan of two or more."""
        middle = self.num_sequences // 2
        verified = max(0, middle - len(self.decodes))
        cut = max(0, verified - len(self.verifications))
        return (
            Plan(self.decodes[:middle], self.chunks[:cut], self.verifications[:verified]),
            Plan(self.decodes[middle:], self.chunks[cut:], self.verifications[verified:]),
        )


def cut_chunk(seq: Sequence, max_tokens: int, max_rows: int) -> Chunk:
    """The longest next chunk of a sequence within a token and a logit-row budget; it may be empty."""
    start = seq.num_computed_tokens
    end = min(seq.num_tokens, start + max_tokens)
    first_score = max(start, seq.num_scored)
    if first_score + max_rows < seq.score_end:
        end = min(end, first_score + max_rows)
    num_score_rows = max(0, min(end, seq.score_end) - first_score)
    samples = end == seq.num_tokens and seq.generates
    if samples and num_score_rows >= max_rows:
        end, samples = end - 1, False
    return Chunk(seq, max(0, end - start), num_score_rows, samples)
