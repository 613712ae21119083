"""The primitives as this package calls them, against the published vectors of those who define them."""

import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from aggregation import masks, rotation
from aggregation.errors import TrustError
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.transcript.merkle import EMPTY, Tree, verify_consistency, verify_inclusion

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


# The Merkle tree against the reference tree of the Certificate Transparency project: eight leaves, published
# hashes. Leaves, roots and proofs are those that transparency-dev/merkle publishes in testonly/reference_test.go.
LEAVES = [
    bytes.fromhex(leaf)
    for leaf in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOTS = (
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)
INCLUSION = {  # index, size
    (0, 1): (),
    (0, 8): (
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ),
    (5, 8): (
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ),
    (2, 3): ("fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",),
    (1, 5): (
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ),
}
CONSISTENCY = {  # old, new
    (1, 1): (),
    (1, 8): (
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ),
    (6, 8): (
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ),
    (2, 5): (
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ),
}


def test_the_root_of_no_leaf_is_the_hash_of_nothing() -> None:
    assert EMPTY.hex() == ROOTS[0]
    assert Tree().root() == EMPTY


@pytest.mark.parametrize("size", range(9))
def test_roots_of_the_reference_tree(size: int) -> None:
    assert Tree(LEAVES[:size]).root().hex() == ROOTS[size]


@pytest.mark.parametrize(("index", "size"), INCLUSION)
def test_inclusion_proofs_of_the_reference_tree(index: int, size: int) -> None:
    proof = tuple(map(bytes.fromhex, INCLUSION[index, size]))
    assert Tree(LEAVES).inclusion(index, size) == proof
    verify_inclusion(bytes.fromhex(ROOTS[size]), size, index, LEAVES[index], proof)


@pytest.mark.parametrize(("old", "new"), CONSISTENCY)
def test_consistency_proofs_of_the_reference_tree(old: int, new: int) -> None:
    proof = tuple(map(bytes.fromhex, CONSISTENCY[old, new]))
    assert Tree(LEAVES).consistency(old, new) == proof
    verify_consistency(bytes.fromhex(ROOTS[old]), old, bytes.fromhex(ROOTS[new]), new, proof)


# The rotation is bit for bit that of the independent script ``make_rotation.py``.
VECTORS = json.loads(Path(__file__).with_name("rotation.json").read_text())


def numbers(hexes: list[str]) -> Any:
    return np.array([float.fromhex(each) for each in hexes])


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: len(case["vector"]))
def test_a_vector_is_rotated_and_rotated_back_to_the_same_bits(case: dict[str, Any]) -> None:
    seed, vector = rotation.seed(bytes.fromhex(case["adapter"])), numbers(case["vector"])
    assert seed.hex() == case["seed"]
    assert rotation.rotate(vector, seed).tobytes() == numbers(case["rotated"]).tobytes()
    assert rotation.rotate_back(vector, seed).tobytes() == numbers(case["rotated_back"]).tobytes()


def test_the_bound_of_a_coordinate_has_the_same_bits() -> None:
    assert {size: rotation.peak(int(size)).hex() for size in VECTORS["peaks"]} == VECTORS["peaks"]
