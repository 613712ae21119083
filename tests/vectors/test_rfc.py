"""The primitives as this package calls them, against the published vectors of those who define them."""

import hashlib
import hmac

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from aggregation import masks
from aggregation.errors import TrustError
from aggregation.pki.identity import IdentityKey, PublicKey

# RFC 7748, section 6.1
ALICE = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
ALICE_PUBLIC = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
BOB = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
BOB_PUBLIC = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
SHARED = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"

# RFC 8032, section 7.1, test 1
SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
PUBLIC = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
SIGNATURE = (
    "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555"
    "fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
)

# NIST SP 800-38A, F.1.5 (AES-256, one block)
AES_KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
PLAIN = bytes.fromhex("6bc1bee22e409f96e93d7e117393172a")
CIPHERTEXT = "f3eed1bdb5d2a03c064b5a7e3db181f8"


def aes_block(key: bytes, block: bytes) -> bytes:
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(block)  # noqa: S305 - the bare block cipher


def test_x25519_of_rfc_7748() -> None:
    assert masks.public_key(ALICE).hex() == ALICE_PUBLIC
    assert masks.public_key(BOB).hex() == BOB_PUBLIC
    assert masks.shared_secret(ALICE, bytes.fromhex(BOB_PUBLIC)).hex() == SHARED
    assert masks.shared_secret(BOB, bytes.fromhex(ALICE_PUBLIC)).hex() == SHARED


def test_ed25519_of_rfc_8032() -> None:
    key = IdentityKey(SEED)
    assert key.public.raw.hex() == PUBLIC
    assert Ed25519PrivateKey.from_private_bytes(SEED).sign(b"").hex() == SIGNATURE


def test_our_signatures_are_ed25519_over_the_framed_body() -> None:
    framed = b"edgeadapt/1\x00" + b"\x05" + b"offer" + b"body"
    assert IdentityKey(SEED).sign("offer", b"body") == Ed25519PrivateKey.from_private_bytes(SEED).sign(framed)
    with pytest.raises(TrustError):
        PublicKey(bytes.fromhex(PUBLIC)).verify("offer", b"", bytes.fromhex(SIGNATURE))


def test_hkdf_of_rfc_5869_test_case_1() -> None:
    hkdf = HKDF(hashes.SHA256(), 42, bytes(range(13)), bytes(range(0xF0, 0xFA)))
    expected = "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    assert hkdf.derive(b"\x0b" * 22).hex() == expected


def test_our_keys_are_hkdf_by_hand() -> None:
    # RFC 5869, sections 2.2 and 2.3, with no salt and one block of output.
    extracted = hmac.digest(bytes(32), b"secret", hashlib.sha256)
    info = (2).to_bytes(4, "big") + b"ab" + (1).to_bytes(4, "big") + b"c"
    assert masks.derive(b"secret", b"ab", b"c") == hmac.digest(extracted, info + b"\x01", hashlib.sha256)


def test_aes_256_of_sp_800_38a() -> None:
    assert aes_block(AES_KEY, PLAIN).hex() == CIPHERTEXT


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<u8"])
def test_our_masks_are_aes_of_a_counter_from_zero_in_little_endian_elements(dtype: str) -> None:
    stream = b"".join(aes_block(AES_KEY, counter.to_bytes(16, "big")) for counter in range(100))
    expected = np.frombuffer(stream, dtype)
    assert np.array_equal(masks.expand(AES_KEY, expected.size, np.dtype(dtype)), expected)
