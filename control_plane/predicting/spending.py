"""Dollars by tenant and model: what requests were predicted to cost, what they did, and what that says of the next one.

A request's cost is the part of its engine's time that it took, at the instance's price: its prompt's own steps, and of each decode step
one share of the batch. The costs of all requests add up to the price of the time in which engines worked.
"""

from __future__ import annotations

from typing import Final, NamedTuple

MS_PER_HOUR: Final = 3_600_000.0
MAX_ACCOUNTS: Final = 4096
#: requests that the ratio of actual to predicted remembers, and as how many it takes 1.0 at first
MEMORY: Final = 500.0
_PRIOR: Final = 8.0


class TenantCost(NamedTuple):
    """One tenant's requests of one model since start, of those that were measured."""

    tenant: str
    model: str
    requests: int
    predicted_usd: float
    actual_usd: float
    #: of one request lately, actual
    usual_usd: float


class _Account:
    """Sums since start, and lately."""

    __slots__ = ("actual", "plain", "predicted", "recent", "requests", "weight")

    def __init__(self) -> None:
        self.requests = 0
        self.predicted = self.actual = 0.0
        #: lately: before the correction by history, actual, and requests
        self.plain = self.recent = self.weight = 0.0


class Spending:
    """Accounts by (tenant, model); when they are too many, the oldest goes."""

    __slots__ = ("_accounts", "_models")

    def __init__(self) -> None:
        self._accounts: dict[tuple[str, str], _Account] = {}
        #: of all tenants together, by model
        self._models: dict[str, _Account] = {}

    def ratio(self, tenant: str, model: str) -> float:
        """Actual over predicted, lately: of this tenant and model, or of the model, 1.0 at first."""
        found = self._accounts.get((tenant, model))
        if found is None or found.weight < _PRIOR:
            found = self._models.get(model)
        if found is None or found.weight < 1.0:
            return 1.0
        mean = found.plain / found.weight
        ratio = (found.recent + _PRIOR * mean) / (found.plain + _PRIOR * mean) if mean > 0.0 else 1.0
        return min(30.0, max(0.03, ratio))

    def settle(self, tenant: str, model: str, plain_usd: float, predicted_usd: float, actual_usd: float) -> None:
        """A request ended. ``plain_usd``: predicted without :meth:`ratio`."""
        accounts = self._accounts
        account = accounts.get((tenant, model))
        if account is None:
            if len(accounts) >= MAX_ACCOUNTS:
                del accounts[next(iter(accounts))]
            account = accounts[(tenant, model)] = _Account()
        whole = self._models.get(model)
        if whole is None:
            if len(self._models) >= MAX_ACCOUNTS:
                del self._models[next(iter(self._models))]
            whole = self._models[model] = _Account()
        _add(account, plain_usd, predicted_usd, actual_usd)
        _add(whole, plain_usd, predicted_usd, actual_usd)

    def usual_usd(self, tenant: str, model: str) -> float | None:
        """What a request of this tenant and model has cost lately; None without history."""
        found = self._accounts.get((tenant, model))
        return found.recent / found.weight if found is not None and found.weight > 0.0 else None

    def listed(self) -> list[TenantCost]:
        """All accounts, the dearest first."""
        rows = [
            TenantCost(tenant, model, one.requests, one.predicted, one.actual, one.recent / one.weight if one.weight else 0.0)
            for (tenant, model), one in self._accounts.items()
        ]
        rows.sort(key=_actual, reverse=True)
        return rows


def _add(account: _Account, plain_usd: float, predicted_usd: float, actual_usd: float) -> None:
    account.requests += 1
    account.predicted += predicted_usd
    account.actual += actual_usd
    fade = 1.0 - 1.0 / MEMORY
    account.plain = fade * account.plain + plain_usd
    account.recent = fade * account.recent + actual_usd
    account.weight = fade * account.weight + 1.0


def _actual(row: TenantCost) -> float:
    return row.actual_usd
