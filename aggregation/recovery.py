"""Opening a round's secrets from the shares that devices sent, and naming who sent a wrong one.

A secret counts only if it matches what its owner published in its advert: the seed its commitment, the mask key
its public key. So a wrong share can cost a round but never make a wrong sum. Only where the first ``t`` shares
fail are the dealer's digests of the shares looked at: a share that is not the one dealt is its holder's fault;
shares that are as dealt and do not open the secret are the dealer's. So is a secret of which more holders than may be
corrupt have no share, although they answered: their boxes did not open.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from aggregation import graph, masks, shamir, sharing
from aggregation.messages import EncryptedShares, Plan, UnmaskResponse
from aggregation.session import Session, commitment
from aggregation.spec import CORRUPT_FRACTION

MOST_SETS = 10_000  # of a cheating dealer's holders that are tried: all there are of 16


@dataclass(slots=True)
class Recovery:
    """One round's openings.

    Args:
        session: The public side.
        plan: Of the round.
        encrypted_shares: Dealer → holder → box, as the dealers signed them.
        openings: Holder → its answer.
        blamed: Filled as wrong shares are found.
    """

    session: Session
    plan: Plan
    encrypted_shares: Mapping[str, Mapping[str, EncryptedShares]]
    responses: Mapping[str, UnmaskResponse]
    blamed: set[str] = field(default_factory=set)
    _coefficients: dict[tuple[int, ...], list[int]] = field(default_factory=dict, repr=False)
    _seeds: Mapping[str, Mapping[str, bytes]] = field(init=False, repr=False)
    _keys: Mapping[str, Mapping[str, bytes]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._seeds = _by_dealer({holder: opening.seeds for holder, opening in self.responses.items()})
        self._keys = _by_dealer({holder: opening.keys for holder, opening in self.responses.items()})

    def seed(self, dealer: str) -> bytes | None:
        """The self-mask seed of a survivor, or nothing where too few good shares are left."""
        shares = self._seeds.get(dealer, {})
        expected = self.session.peers[dealer].commitments[self.plan.round - 1]
        return self._open(
            dealer, 0, shares, lambda seed: commitment(seed, self.session.offer, dealer, self.plan.round) == expected
        )

    def mask_key(self, dealer: str) -> bytes | None:
        """The mask key of a device that dropped, or nothing where too few good shares are left."""
        shares = self._keys.get(dealer, {})
        expected = self.session.peers[dealer].mask_keys[self.plan.round - 1]
        return self._open(dealer, 1, shares, lambda key: masks.public_key(key) == expected)

    def _open(
        self, dealer: str, kind: int, shares: Mapping[str, bytes], right: Callable[[bytes], bool]
    ) -> bytes | None:
        t = self.session.spec.threshold
        if len(shares) < t:
            if self._without(dealer) > graph.count_of(len(self.session.peers), CORRUPT_FRACTION):
                self.blamed.add(dealer)
            return None
        secret = self._combine(list(shares)[:t], shares)
        if secret is not None and right(secret):
            return secret
        for holders in _sets(self._as_dealt(dealer, kind, shares), t):
            secret = self._combine(holders, shares)
            if secret is not None and right(secret):
                return secret
            self.blamed.add(dealer)  # enough shares just as it dealt them, and they do not open its secret
        return None

    def _without(self, dealer: str) -> int:
        """Holders that answered, and gave no share of ``dealer``."""
        answers = map(self.responses.__getitem__, self.session.neighbors(dealer, self.responses))
        return sum(dealer not in answer.seeds and dealer not in answer.keys for answer in answers)

    def _as_dealt(self, dealer: str, kind: int, shares: Mapping[str, bytes]) -> list[str]:
        """Holders whose share is the one dealt to them; the others are blamed. The dealer's own share comes last."""
        index = 2 * (self.plan.round - 1) + kind
        dealt = {holder: box.digests[index] for holder, box in self.encrypted_shares[dealer].items()}
        wrong = {holder for holder in shares if holder != dealer and sharing.digest(shares[holder]) != dealt[holder]}
        self.blamed |= wrong
        return sorted(set(shares) - wrong - {dealer}) + [dealer] * (dealer in shares)

    def _combine(self, holders: Sequence[str], shares: Mapping[str, bytes]) -> bytes | None:
        points = tuple(self.session.positions(holders))
        if points not in self._coefficients:
            self._coefficients[points] = shamir.lagrange(points)
        return shamir.combine(self._coefficients[points], [shares[holder] for holder in holders])


def _sets(holders: Sequence[str], t: int) -> Iterator[tuple[str, ...]]:
    """Every ``t`` of ``holders`` where that can be tried, else every ``t`` in a row."""
    if math.comb(len(holders), t) <= MOST_SETS:
        return itertools.combinations(holders, t)
    return (tuple((*holders, *holders)[start : start + t]) for start in range(len(holders)))


def _by_dealer(held: Mapping[str, Mapping[str, bytes]]) -> dict[str, dict[str, bytes]]:
    """Holder → dealer → share, the other way round."""
    turned: dict[str, dict[str, bytes]] = {}
    for holder, shares in held.items():
        for dealer, share in shares.items():
            turned.setdefault(dealer, {})[holder] = share
    return turned
