"""Reconstruction of a round's secrets from the revealed shares, and attribution of wrong shares.

A secret counts only if it matches what its owner published in its advert: the seed its commitment, the mask key its
public key. A wrong share can therefore cost a round but never produce a wrong sum. Only where the first ``t`` shares
fail are the dealer's digests consulted. A share that is not the one dealt is its holder's fault; shares that are as
dealt and do not reconstruct the secret are the dealer's. So is a secret of which more holders than may be corrupt have
no share, although they answered: their encrypted shares did not decrypt."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from aggregation import graph, groups, masks, shamir, sharing
from aggregation.masks import Mask
from aggregation.messages import EncryptedShares, Plan, UnmaskResponse
from aggregation.session import Session, commitment
from aggregation.spec import CORRUPT_FRACTION

MOST_SETS = 10_000  # of holders of a cheating dealer's shares that are tried: all sets of 16 holders


@dataclass(slots=True)
class Recovery:
    session: Session
    plan: Plan
    # Dealer → holder → shares, as the dealers signed them.
    encrypted_shares: Mapping[str, Mapping[str, EncryptedShares]]
    responses: Mapping[str, UnmaskResponse]  # holder → its unmask response
    # Devices of the cohort that may be corrupt, and so may say that they have no share of an honest dealer; None: a
    # tenth of the roster, rounded up.
    corrupt: int | None = None
    # Devices found to have dealt or revealed a wrong share; grows as secrets are reconstructed.
    blamed: set[str] = field(default_factory=set)
    _coefficients: dict[tuple[int, ...], list[int]] = field(default_factory=dict, repr=False)
    _seeds: Mapping[str, Mapping[str, bytes]] = field(init=False, repr=False)
    _keys: Mapping[str, Mapping[str, bytes]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._seeds = _by_dealer({holder: response.seeds for holder, response in self.responses.items()})
        self._keys = _by_dealer({holder: response.keys for holder, response in self.responses.items()})

    def seed(self, dealer: str) -> bytes | None:
        """The self-mask seed of a survivor, or None if too few good shares are left."""
        shares = self._seeds.get(dealer, {})
        expected = self.session.peers[dealer].commitments[self.plan.round - 1]
        return self._reconstruct(
            dealer, 0, shares, lambda seed: commitment(seed, self.session.offer, dealer, self.plan.round) == expected
        )

    def mask_key(self, dealer: str) -> bytes | None:
        """The mask key of a device that dropped out, or None if too few good shares are left."""
        shares = self._keys.get(dealer, {})
        expected = self.session.peers[dealer].mask_keys[self.plan.round - 1]
        return self._reconstruct(dealer, 1, shares, lambda key: masks.public_key(key) == expected)

    def _reconstruct(
        self, dealer: str, kind: int, shares: Mapping[str, bytes], matches: Callable[[bytes], bool]
    ) -> bytes | None:
        t = self.session.spec.threshold
        if len(shares) < t:
            tenth = graph.count_of(len(self.session.peers), CORRUPT_FRACTION)
            if self._without_share(dealer) > (tenth if self.corrupt is None else self.corrupt):
                self.blamed.add(dealer)
            return None
        secret = self._combine(list(shares)[:t], shares)
        if secret is not None and matches(secret):
            return secret
        for holders in _sets(self._as_dealt(dealer, kind, shares), t):
            secret = self._combine(holders, shares)
            if secret is not None and matches(secret):
                return secret
            self.blamed.add(dealer)  # enough shares exactly as dealt, and they do not reconstruct its secret
        return None

    def _without_share(self, dealer: str) -> int:
        """Number of holders that answered without a share of ``dealer``."""
        answers = map(self.responses.__getitem__, self.session.neighbors(dealer, self.responses))
        return sum(dealer not in answer.seeds and dealer not in answer.keys for answer in answers)

    def _as_dealt(self, dealer: str, kind: int, shares: Mapping[str, bytes]) -> list[str]:
        """Holders whose share is the one dealt to them; the others are blamed. The dealer's own share comes last."""
        index = 2 * (self.plan.round - 1) + kind
        digests = {holder: encrypted.digests[index] for holder, encrypted in self.encrypted_shares[dealer].items()}
        wrong = {holder for holder in shares if holder != dealer and sharing.digest(shares[holder]) != digests[holder]}
        self.blamed |= wrong
        return sorted(set(shares) - wrong - {dealer}) + [dealer] * (dealer in shares)

    def _combine(self, holders: Sequence[str], shares: Mapping[str, bytes]) -> bytes | None:
        points = tuple(self.session.positions(holders))
        if points not in self._coefficients:
            self._coefficients[points] = shamir.lagrange(points)
        return shamir.combine(self._coefficients[points], [shares[holder] for holder in holders])


def masks_to_remove(
    session: Session, plan: Plan, survivors: Sequence[str], seeds: Mapping[str, bytes], keys: Mapping[str, bytes]
) -> Iterator[Mask]:
    """The opposites of the masks that the sum of a group's survivors still has: their self masks, and those that they
    share with dropouts. ``survivors``: of one group, or all if there are no groups. ``seeds``: survivor → its seed.
    ``keys``: device of the plan that dropped out → its mask key."""
    digest = plan.digest()
    for device in survivors:
        yield Mask(masks.self_key(seeds[device], session.context, digest, device), add=False)
    for device, private in keys.items():
        publics = session.mask_keys(groups.mask_peers(session, plan, device, survivors), plan.round)
        yield from masks.pair_masks(private, device, publics, session.context, digest)


def _sets(holders: Sequence[str], t: int) -> Iterator[tuple[str, ...]]:
    """Every set of ``t`` holders if there are at most ``MOST_SETS``, else every ``t`` consecutive ones."""
    if math.comb(len(holders), t) <= MOST_SETS:
        return itertools.combinations(holders, t)
    return (tuple((*holders, *holders)[start : start + t]) for start in range(len(holders)))


def _by_dealer(held: Mapping[str, Mapping[str, bytes]]) -> dict[str, dict[str, bytes]]:
    """Holder → dealer → share, as dealer → holder → share."""
    shares: dict[str, dict[str, bytes]] = {}
    for holder, by_dealer in held.items():
        for dealer, share in by_dealer.items():
            shares.setdefault(dealer, {})[holder] = share
    return shares
