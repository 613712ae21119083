"""Encrypted shares: a dealer's secrets, shared among its neighbors and encrypted for each holder.

The shares for a holder are encrypted with AES-256-GCM under a key from X25519 and HKDF-SHA256 that is bound to the
session, the dealer and the holder. It serves one encryption, so the nonce can be zero, and the ciphertext decrypts
nowhere else. With it the dealer publishes a digest of each share. A holder that later reveals another value is thereby
found out, and so is a dealer whose shares match their digests but not its commitment."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from aggregation import masks, shamir, wire
from aggregation.entropy import Entropy
from aggregation.messages import AEAD_TAG, PAIR, SHARE_DIGEST, EncryptedShares, Key
from aggregation.session import Session
from aggregation.shamir import SHARE

_TAG = b"edgeadapt/share-encryption/1"
_NONCE = bytes(12)
_Share: TypeAlias = Annotated[bytes, wire.fixed(SHARE)]


@dataclass(frozen=True, slots=True)
class Secrets:
    """A device's own secrets of one round: X25519 mask key and self-mask seed, 32 bytes each."""

    mask_key: Key = field(repr=False)
    seed: Key = field(repr=False)


@dataclass(frozen=True, slots=True)
class SharePair:
    """A holder's shares from one dealer for one round: one of the seed and one of the mask key, 33 bytes each."""

    seed: _Share = field(repr=False)
    key: _Share = field(repr=False)


def deal(
    session: Session, dealer: str, share_key: bytes, secrets: Mapping[int, Secrets], entropy: Entropy
) -> tuple[dict[int, SharePair], dict[str, EncryptedShares]]:
    """Share the secrets of every round among the dealer and its neighbors.

    Args:
        session: Its graph says who the holders are.
        secrets: Round → secrets, for all rounds of the session.

    Returns:
        Round → the dealer's own pair, and neighbor → encrypted shares.
    """
    holders = [dealer, *session.neighbors(dealer, session.peers)]
    points, threshold = session.positions(holders), session.spec.threshold
    pairs: dict[str, dict[int, SharePair]] = {holder: {} for holder in holders}
    for round_, secret in secrets.items():
        seeds = shamir.split(secret.seed, threshold, points, entropy)
        keys = shamir.split(secret.mask_key, threshold, points, entropy)
        for holder, seed, key in zip(holders, seeds, keys, strict=True):
            pairs[holder][round_] = SharePair(seed, key)
    private = masks.private_key(share_key)
    encrypted = {holder: encrypt(session, private, dealer, holder, pairs[holder]) for holder in holders[1:]}
    return pairs[dealer], encrypted


def encrypt(
    session: Session, share_key: X25519PrivateKey, dealer: str, holder: str, pairs: Mapping[int, SharePair]
) -> EncryptedShares:
    """Encrypt one holder's pairs, in order of round, with a digest of each share."""
    ordered = [share for _, pair in sorted(pairs.items()) for share in (pair.seed, pair.key)]
    key = _key(session, share_key, session.peers[holder].share_key, dealer, holder)
    return EncryptedShares(AESGCM(key).encrypt(_NONCE, b"".join(ordered), session.context), tuple(map(digest, ordered)))


def decrypt(
    session: Session, share_key: X25519PrivateKey, dealer: str, holder: str, encrypted: EncryptedShares
) -> dict[int, SharePair] | None:
    """Round → pair, or None if the dealer encrypted something that does not match its digests. None is not an error:
    one bad dealer must not stop the others. The holder then has no share of that dealer."""
    if not fits(encrypted, session.spec.rounds):
        return None
    try:
        key = _key(session, share_key, session.peers[dealer].share_key, dealer, holder)
        plain = AESGCM(key).decrypt(_NONCE, encrypted.ciphertext, session.context)
    except InvalidTag:
        return None
    shares = [plain[i : i + SHARE] for i in range(0, len(plain), SHARE)]
    if tuple(map(digest, shares)) != encrypted.digests:
        return None
    return {i // 2 + 1: SharePair(shares[i], shares[i + 1]) for i in range(0, len(shares), 2)}


def fits(encrypted: EncryptedShares, rounds: int) -> bool:
    return len(encrypted.ciphertext) == rounds * PAIR + AEAD_TAG and len(encrypted.digests) == 2 * rounds


def digest(share: bytes) -> bytes:
    """The dealer's public digest of a share, 16 bytes. It hides the share, which is uniform to any other device."""
    return hashlib.sha256(b"edgeadapt/share/1\x00" + share).digest()[:SHARE_DIGEST]


def _key(session: Session, private: X25519PrivateKey, public: bytes, dealer: str, holder: str) -> bytes:
    secret = masks.exchange(private, public)
    return masks.derive(secret, _TAG, session.context, dealer.encode(), holder.encode())
