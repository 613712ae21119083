"""What the sums of a coordinator may have revealed of one device, from its logs alone. A sum counts once its survivors
were named to devices, whether or not the round has a result: from then on answers can unmask it. Each device counts for
the sums that it is in, without amplification by sampling; the account is that of the device that spent most."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from aggregation import envelope
from aggregation.errors import TrustError
from aggregation.messages import Offer, Survivors, Unmask
from aggregation.privacy.accounting import NOTHING, Spent
from aggregation.spec import SessionSpec
from aggregation.transcript.entries import Entry
from edgeadapt.auditing.findings import Check, Finding, Report, Status, count
from edgeadapt.formats.manifest import RoundRecord

_TOLERANCE = 1e-9  # relative: logarithms differ in the last bits between machines


@dataclass(frozen=True, slots=True)
class Account:
    spent: Mapping[str, Spent] = field(default_factory=dict)  # device → by the sums with noise that it is in
    noisy: int = 0  # number of these sums
    bare: int = 0  # sums without noise, which nothing bounds: there is no epsilon after one

    def after(self, spec: SessionSpec, survivors: Collection[str]) -> "Account":
        """Return the account after a round with these named survivors; none: nothing was revealed."""
        if not survivors:
            return self
        if spec.privacy is None:
            return replace(self, bare=self.bare + 1)
        cost = spec.spent(len(survivors))
        before = {device: self.spent.get(device, NOTHING) for device in survivors}
        total = {one: one + cost for one in set(before.values())}  # few: most devices are in the same sums
        spent = {**self.spent, **{device: total[one] for device, one in before.items()}}
        return Account(spent, self.noisy + 1, self.bare)

    def epsilon(self, spec: SessionSpec) -> float | None:
        """Return ε of the device that spent most, for a session's δ; None if none is finite, as after a bare sum."""
        largest = math.inf if self.bare else _largest(spec, self.spent.values())
        return largest if math.isfinite(largest) else None

    def epsilon_of_next(self, spec: SessionSpec, devices: Collection[str]) -> float:
        """Return ε after another sum over ``devices`` or some of them, if no more survive than must; maybe infinite."""
        cost = spec.spent(spec.minimum_survivors)
        return _largest(spec, (one + cost for one in {self.spent.get(device, NOTHING) for device in devices}))


def _largest(spec: SessionSpec, spent: Iterable[Spent]) -> float:
    if spec.privacy is None:
        return math.inf
    return max((one.epsilon(spec.privacy.delta) for one in set(spent)), default=0.0)


def logged(account: Account, entries: Iterable[Entry]) -> Account:
    for spec, survivors in sums(entries):
        account = account.after(spec, survivors)
    return account


def sums(entries: Iterable[Entry]) -> list[tuple[SessionSpec, Collection[str]]]:
    """List the sums of a log whose entries were verified, each with the survivors that were named to devices."""
    spec: SessionSpec | None = None
    rounds: dict[int, Collection[str]] = {}
    for entry in entries:
        body = envelope.unverified_body(entry.message)
        if entry.kind == Offer.TAG:
            spec = Offer.decode(body).spec
        elif entry.kind == Survivors.TAG:
            rounds.setdefault(entry.round, Survivors.decode(body).vectors.keys())
        elif entry.kind == Unmask.TAG:
            rounds.setdefault(entry.round, Unmask.decode(body).survivors.vectors.keys())
    return [(spec, survivors) for survivors in rounds.values()] if spec is not None else []


def audited(account: Account, report: Report) -> tuple[Account, Report]:
    """Return the account after an audited session, and its report with the ε after each round and a finding."""
    spec, before = report.spec, account
    if report.failed or spec is None:
        return account, replace(report, findings=(*report.findings, Finding(Check.PRIVACY, Status.NOT_REACHED, "")))
    rounds = []
    for summary in report.rounds:
        account = account.after(spec, summary.survivors)
        rounds.append(replace(summary, epsilon=account.epsilon(spec)))
    finding = Finding(Check.PRIVACY, Status.PASS, _text(spec, account, account.noisy - before.noisy))
    return account, replace(report, rounds=tuple(rounds), findings=(*report.findings, finding))


def _text(spec: SessionSpec, account: Account, here: int) -> str:
    if spec.privacy is None:
        return "the sums of this session have no noise: nothing bounds what they say about a device"
    if account.bare:
        text = f"{count(account.bare, 'sum')} of this coordinator without noise"
        return f"nothing bounds what all sums say about a device, because of {text}"
    epsilon = account.epsilon(spec)
    if epsilon is None:
        return "the sums of this session have too little noise for a finite epsilon"
    corrupt = count(spec.minimum_survivors - spec.privacy.honest, "survivor")
    delta, kind, sums = spec.privacy.delta, spec.privacy.mechanism.value, count(account.noisy, "sum")
    return (
        f"epsilon {epsilon:.3f} for delta {delta:g}, of the device that spent most, after {sums} with noise, {here} in "
        f"this session, with {kind} noise; {corrupt} of each may have added none"
    )


def require_recorded(records: Sequence[RoundRecord], reports: Mapping[str, Report]) -> None:
    """Check that each record states the ε that follows from the logs. Raises TrustError if one states another."""
    epsilons = {(report.offer, each.plan): each.epsilon for report in reports.values() for each in report.rounds}
    for record in records:
        if record.plan is None:
            continue
        expected = epsilons.get((record.offer, record.plan))
        same = record.epsilon == expected
        if record.epsilon is not None and expected is not None:
            same = abs(record.epsilon - expected) <= _TOLERANCE * expected
        if not same:
            text = f"round {record.round} was recorded with an epsilon of {record.epsilon}"
            text += f", and its log gives {expected}"
            raise TrustError(text, about="record.epsilon")
