"""Fair shares between tenants: virtual token counters.

Each tenant has a counter of the tokens that were computed for it (its uncached prompt tokens at admission, then every
generated token); of the tenants that wait, the one with the lowest counter is admitted next. A tenant that comes to
ask starts no lower than the lowest counter of those already there, so being away saves nothing up; one that left with
a higher counter keeps it. Nothing is kept once no tenant is there.

Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024 (virtual token counter).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

MAX_ABSENT = 1024
"""Tenants without a request whose counters are remembered."""


@dataclass(slots=True, eq=False)
class Account:
    """What one tenant was given. `num_tokens` is raised by whoever computes for it."""

    tenant: str
    num_tokens: int = 0
    num_sequences: int = 0
    """Living sequences; the account is present while there is one."""
    last_admitted_s: float = 0.0
    """When a sequence of this tenant last went from waiting to running."""


class FairShare:
    """The accounts of all tenants that have a living sequence, and of some that had."""

    def __init__(self) -> None:
        self._present: dict[str, Account] = {}
        self._absent: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._present)

    def enter(self, tenant: str) -> Account:
        """The account of a tenant that has one more sequence."""
        account = self._present.get(tenant)
        if account is None:
            lowest = min((other.num_tokens for other in self._present.values()), default=0)
            account = Account(tenant, max(lowest, self._absent.pop(tenant, 0)))
            self._present[tenant] = account
        account.num_sequences += 1
        return account

    def leave(self, account: Account) -> None:
        """One sequence of this tenant has ended."""
        account.num_sequences -= 1
        if account.num_sequences:
            return
        del self._present[account.tenant]
        if not self._present:
            self._absent.clear()
            return
        self._absent[account.tenant] = account.num_tokens
        if len(self._absent) > MAX_ABSENT:
            self._absent.popitem(last=False)
