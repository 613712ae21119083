"""Share boxes: a dealer's secrets, shared among the roster and sealed for each holder.

A box is sealed once with AES-256-GCM under a key of X25519 and HKDF-SHA256 that is bound to the session, the
dealer and the holder, so it opens nowhere else, and its nonce can be zero. Beside it the dealer publishes a
digest of each share: a holder that later passes on another value is found out, and so is a dealer whose shares
match their digests but not its commitment.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from aggregation import masks, shamir
from aggregation.entropy import Entropy
from aggregation.messages import AEAD_TAG, PAIR, SHARE_DIGEST, EncryptedShares
from aggregation.session import Session
from aggregation.shamir import SHARE

_TAG = b"edgeadapt/share-encryption/1"
_NONCE = bytes(12)


@dataclass(frozen=True, slots=True)
class Secrets:
    """A device's own secrets of one round: X25519 mask key and self-mask seed, 32 bytes each."""

    mask_key: bytes = field(repr=False)
    seed: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SharePair:
    """What a holder has of one dealer for one round: a share of its seed and one of its mask key, 33 bytes each."""

    seed: bytes = field(repr=False)
    key: bytes = field(repr=False)


def deal(
    session: Session, dealer: str, share_key: bytes, secrets: Mapping[int, Secrets], entropy: Entropy
) -> tuple[dict[int, SharePair], dict[str, EncryptedShares]]:
    """Share the secrets of every round.

    Args:
        session: The roster says among whom.
        dealer: Whose secrets they are.
        box_key: The dealer's private X25519 key for boxes.
        secrets: By round, all rounds of the session.
        entropy: Draws the polynomials.

    Returns:
        The dealer's own pairs by round, and a box for each neighbour.
    """
    holders = [dealer, *session.neighbors(dealer, session.peers)]
    points, threshold = session.positions(holders), session.spec.threshold
    pairs: dict[str, dict[int, SharePair]] = {holder: {} for holder in holders}
    for round_, secret in secrets.items():
        seeds = shamir.split(secret.seed, threshold, points, entropy)
        keys = shamir.split(secret.mask_key, threshold, points, entropy)
        for holder, seed, key in zip(holders, seeds, keys, strict=True):
            pairs[holder][round_] = SharePair(seed, key)
    encrypted_shares = {holder: encrypt(session, share_key, dealer, holder, pairs[holder]) for holder in holders[1:]}
    return pairs[dealer], encrypted_shares


def encrypt(
    session: Session, share_key: bytes, dealer: str, holder: str, pairs: Mapping[int, SharePair]
) -> EncryptedShares:
    """Seal one holder's pairs, in order of round."""
    ordered = [share for _, pair in sorted(pairs.items()) for share in (pair.seed, pair.key)]
    key = _key(session, share_key, session.peers[holder].share_key, dealer, holder)
    return EncryptedShares(AESGCM(key).encrypt(_NONCE, b"".join(ordered), session.context), tuple(map(digest, ordered)))


def decrypt(
    session: Session, share_key: bytes, dealer: str, holder: str, box: EncryptedShares
) -> dict[int, SharePair] | None:
    """The pairs in ``box`` by round, or nothing where the dealer made a box that does not hold what it says.

    Nothing is no error: one bad dealer must not stop the others. The holder just has no share of that dealer.
    """
    if not fits(box, session.spec.rounds):
        return None
    try:
        key = _key(session, share_key, session.peers[dealer].share_key, dealer, holder)
        opened = AESGCM(key).decrypt(_NONCE, box.ciphertext, session.context)
    except InvalidTag:
        return None
    shares = [opened[i : i + SHARE] for i in range(0, len(opened), SHARE)]
    if tuple(map(digest, shares)) != box.digests:
        return None
    return {i // 2 + 1: SharePair(shares[i], shares[i + 1]) for i in range(0, len(shares), 2)}


def fits(box: EncryptedShares, rounds: int) -> bool:
    """Whether ``box`` has the size of one for ``rounds`` rounds."""
    return len(box.ciphertext) == rounds * PAIR + AEAD_TAG and len(box.digests) == 2 * rounds


def digest(share: bytes) -> bytes:
    """The dealer's public digest of a share. Hides, as a share is as good as random for who has fewer than ``t``."""
    return hashlib.sha256(b"edgeadapt/share/1\x00" + share).digest()[:SHARE_DIGEST]


def _key(session: Session, private: bytes, public: bytes, dealer: str, holder: str) -> bytes:
    secret = masks.shared_secret(private, public)
    return masks.derive(secret, _TAG, session.context, dealer.encode(), holder.encode())
