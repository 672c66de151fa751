"""Prompts for load tests: random common words, most of them one token in every vocabulary, no two with a common start.

The same seed gives the same prompts for every server, whatever its tokenizer; how many tokens they came to, its usage
report says.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final

_TEXT: Final = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power
hour game line end member law car city community name president team minute idea kid body information back parent face
others level office door health person art war history party result change morning reason research girl guy moment air
teacher force education foot boy age policy music market sense nation plan college interest death experience effect
use class control field development role effort rate heart drug show leader light voice wife police mind price report
decision son view relationship town road arm difference value building action season society tax director position
player record paper space ground form event official matter center couple site project activity star table need court
oil situation cost industry figure street image phone data picture practice piece land product doctor wall patient
worker news test movie north love support technology step baby computer type film tree source
"""
WORDS: Final = tuple(_TEXT.split())
_FIRST_ID: Final = 1000
"""Random ids start here: below lie control tokens and single bytes."""


def random_prompts(num_tokens: int, seed: int) -> Iterator[str]:
    """Endless prompts of about `num_tokens` tokens; the first two words are another pair in each of them."""
    rng = random.Random(seed)
    pairs = rng.sample(range(len(WORDS) ** 2), k=len(WORDS) ** 2)
    for pair in pairs:
        start = [WORDS[pair // len(WORDS)], WORDS[pair % len(WORDS)]]
        yield " ".join((start + rng.choices(WORDS, k=max(0, num_tokens - 2)))[: max(1, num_tokens)])


def random_token_ids(rng: random.Random, num_tokens: int, vocab_size: int) -> list[int]:
    """A prompt for an engine without a tokenizer in front; the ids of control tokens and single bytes are left out."""
    return [rng.randrange(min(_FIRST_ID, vocab_size // 2), vocab_size) for _ in range(num_tokens)]


def poisson_arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times in [0, `seconds`) of a Poisson process of `rate` events/s, ascending; the first is at 0.

    Raises `ValueError` for a rate or a duration that is not positive.
    """
    if rate <= 0 or seconds <= 0:
        raise ValueError("rate and duration must be positive")
    rng = random.Random(seed)
    arrivals, at_s = [], 0.0
    while at_s < seconds:
        arrivals.append(at_s)
        at_s += rng.expovariate(rate)
    return arrivals
