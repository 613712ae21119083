"""Makes rounds.json: whole rounds, every byte of them, from docs/protocol.md alone. Shares no code with the project.

    python tests/vectors/make_rounds.py

Run it again only where the protocol has changed: the file is frozen, and the certificates in it are made anew.
"""

import datetime as dt
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

P = 2**256 + 297
SIZE, ROUNDS, HEX = 5, 2, hashlib.sha256(b"vector").hexdigest()


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def stream(label: str, n: int) -> bytes:
    """Bytes that stand for randomness."""
    return b"".join(sha(f"{label}/{i}".encode()) for i in range(-(-n // 32)))[:n]


def u(value: int, size: int) -> bytes:
    return value.to_bytes(size, "big")


def text(value: str) -> bytes:
    return u(len(value), 1) + value.encode()


def blob(value: bytes) -> bytes:
    return u(len(value), 4) + value


def many(items: list[bytes]) -> bytes:
    return u(len(items), 4) + b"".join(items)


def table(entries: dict[str, bytes]) -> bytes:
    return many([text(key) + value for key, value in sorted(entries.items())])


def real(value: float) -> bytes:
    return struct.pack(">d", value)


def sign(key: Ed25519PrivateKey, tag: str, body: bytes) -> bytes:
    return key.sign(b"edgeadapt/1\x00" + u(len(tag), 1) + tag.encode() + body)


def message(key: Ed25519PrivateKey, tag: str, body: bytes) -> bytes:
    return b"EA" + u(1, 1) + text(tag) + blob(body) + sign(key, tag, body)


def digest(tag: str, body: bytes) -> bytes:
    return sha(tag.encode(), b"\x00", body)


def derive(secret: bytes, *bound: bytes) -> bytes:
    info = b"".join(blob(part) for part in bound)
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(secret)


def public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def exchange(private: bytes, other: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(other))


def share(secret: bytes, drawn: bytes, x: int) -> bytes:
    """The polynomial's value at x; what is drawn are its coefficients, highest power first, 48 bytes each."""
    coefficients = [int.from_bytes(drawn[i : i + 48], "big") for i in range(0, len(drawn), 48)]
    powers = range(len(coefficients), 0, -1)
    value = sum(c * x**power for c, power in zip(coefficients, powers, strict=True))
    return u((value + int.from_bytes(secret, "big")) % P, 33)


def mask(key: bytes, bits: int) -> list[int]:
    raw = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * SIZE))
    return [int.from_bytes(raw[i : i + 4], "little") % 2**bits for i in range(0, len(raw), 4)]


def pack(values: list[int], bits: int) -> bytes:
    whole = sum(value << (i * bits) for i, value in enumerate(values))
    return whole.to_bytes((len(values) * bits + 7) // 8, "little")


def certificate(subject: str, key: Ed25519PrivateKey, issuer: Ed25519PrivateKey, authority: bool) -> bytes:
    name = lambda value: x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, value)])  # noqa: E731
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name("vectors"))
        .public_key(key.public_key())
        .serial_number(1 + int.from_bytes(sha(subject.encode())[:8], "big"))
        .not_valid_before(dt.datetime(2026, 1, 1, tzinfo=dt.UTC))
        .not_valid_after(dt.datetime(2126, 1, 1, tzinfo=dt.UTC))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
    )
    return builder.sign(issuer, None).public_bytes(serialization.Encoding.DER)


def transcript(
    label: str, names: list[str], k: int, t: int, bits: int, lost: str, silent: str | None
) -> dict[str, Any]:
    """One session and its first round. ``lost`` sends no masked input; ``silent`` does not agree, and opens nothing."""
    seeds = {who: stream(f"{label}/identity/{who}", 32) for who in (*names, "authority", "coordinator")}
    keys = {who: Ed25519PrivateKey.from_private_bytes(seed) for who, seed in seeds.items()}
    root = certificate("vectors", keys["authority"], keys["authority"], True)
    certificates = {name: certificate(name, keys[name], keys["authority"], False) for name in names}
    out: dict[str, Any] = {
        "root": root,
        "certificates": certificates,
        "identities": seeds,
        "lost": lost,
        "silent": silent,
    }

    vector = many([text("delta") + u(SIZE, 4) + real(1.0)]) + u(bits, 1) + u(len(names), 4)
    spec = b"".join(u(v, 4) for v in (ROUNDS, t, t, k)) + vector + real(2.5) + u(7, 8)
    spec += text("none") + text(HEX) + text(HEX) + text("active")
    out["session"] = stream(f"{label}/session", 32)
    offer = out["session"] + spec + many([blob(certificates[name]) for name in names])
    out["offer"], offered = message(keys["coordinator"], "offer", offer), digest("offer", offer)

    draws = {name: stream(f"{label}/join/{name}", 32 * (1 + 2 * ROUNDS)) for name in names}
    box_key = {name: draws[name][:32] for name in names}
    mask_key = {(name, r): draws[name][64 * r - 32 : 64 * r] for name in names for r in range(1, ROUNDS + 1)}
    seed = {(name, r): draws[name][64 * r : 64 * r + 32] for name in names for r in range(1, ROUNDS + 1)}
    adverts = {}
    for name in names:
        committed = [
            sha(b"edgeadapt/commitment/1\x00", offered, u(r, 4), name.encode(), b"\x00", seed[name, r])
            for r in range(1, ROUNDS + 1)
        ]
        publics = [public(mask_key[name, r]) for r in range(1, ROUNDS + 1)]
        body = offered + text(name) + public(box_key[name]) + many(publics) + many(committed)
        adverts[name] = message(keys[name], "advert", body)
    roster = offered + many([blob(adverts[name]) for name in names])
    context = sha(b"edgeadapt/context/1\x00", offered, digest("roster", roster))
    out |= {"join": draws, "adverts": adverts, "roster": message(keys["coordinator"], "roster", roster)}

    circle = sorted(names, key=lambda name: sha(b"edgeadapt/circle/1\x00", context, name.encode()))
    near = {
        name: sorted({circle[(circle.index(name) + s) % len(names)] for s in range(-(k // 2), k // 2 + 1)} - {name})
        if k < len(names) - 1
        else [other for other in names if other != name]
        for name in names
    }
    polynomials = {name: stream(f"{label}/deal/{name}", 96 * (t - 1) * ROUNDS) for name in names}
    held: dict[tuple[str, str], list[bytes]] = {}  # dealer, holder → seed share and key share, round by round
    boxes: dict[str, dict[str, bytes]] = {}
    for dealer in names:
        for holder in (dealer, *near[dealer]):
            x, shares = names.index(holder) + 1, []
            for r in range(1, ROUNDS + 1):
                drawn = polynomials[dealer][96 * (t - 1) * (r - 1) : 96 * (t - 1) * r]
                shares.append(share(seed[dealer, r], drawn[: 48 * (t - 1)], x))
                shares.append(share(mask_key[dealer, r], drawn[48 * (t - 1) :], x))
            held[dealer, holder] = shares
            if holder != dealer:
                secret = exchange(box_key[dealer], public(box_key[holder]))
                key = derive(secret, b"edgeadapt/box/1", context, dealer.encode(), holder.encode())
                sealed = AESGCM(key).encrypt(bytes(12), b"".join(shares), context)
                digests = many([sha(b"edgeadapt/share/1\x00", one)[:16] for one in shares])
                boxes.setdefault(dealer, {})[holder] = blob(sealed) + digests
    out |= {"deal": polynomials, "near": near}
    out["shares"] = {d: message(keys[d], "shares", context + text(d) + table(boxes[d])) for d in names}

    plan = context + u(1, 4) + many([text(name) for name in names]) + u(3, 8) + text(HEX) + blob(b"train")
    planned = digest("plan", plan)
    out["assignments"] = {
        name: message(keys["coordinator"], "assignment", plan + table({d: boxes[d][name] for d in near[name]}))
        for name in names
    }
    out["plain"] = {n: [b % 2**bits for b in stream(f"{label}/plain/{n}", SIZE)] for n in names}
    out["masked"], vectors, packed_of = {}, {}, {}
    for name in names:
        masked = list(out["plain"][name])
        secrets = [(derive(seed[name, 1], b"edgeadapt/self-mask/1", context, planned, name.encode()), 1)]
        for other in near[name]:
            low, high = sorted((name, other))
            secret = exchange(mask_key[name, 1], public(mask_key[other, 1]))
            bound = (b"edgeadapt/pair-mask/1", context, planned, low.encode(), high.encode())
            secrets.append((derive(secret, *bound), 1 if name < other else -1))
        for key, way in secrets:
            masked = [(value + way * m) % 2**bits for value, m in zip(masked, mask(key, bits), strict=True)]
        packed = pack(masked, bits)
        header = message(keys[name], "masked-input", planned + text(name) + sha(packed))
        out["masked"][name], packed_of[name] = blob(header) + packed, packed
        vectors[name] = sha(packed)

    alive = [name for name in names if name != lost]
    survivors = planned + table({name: vectors[name] for name in alive})
    surviving = digest("survivors", survivors)
    agreed = [name for name in alive if name != silent]
    out["survivors"] = message(keys["coordinator"], "survivors", survivors)
    agreement = {name: surviving + text(name) for name in agreed}
    out["agreements"] = {name: message(keys[name], "agreement", agreement[name]) for name in agreed}
    out["unmask"], out["openings"] = {}, {}
    for name in agreed:
        signers = sorted({name, *near[name]} & set(agreed))[:t]
        signed = table({signer: sign(keys[signer], "agreement", agreement[signer]) for signer in signers})
        out["unmask"][name] = message(keys["coordinator"], "unmask", survivors + signed)
        around = sorted({name, *near[name]})
        seeds_of = table({d: held[d, name][0] for d in around if d in alive})
        keys_of = table({d: held[d, name][1] for d in around if d not in alive})
        out["openings"][name] = message(keys[name], "opening", surviving + text(name) + seeds_of + keys_of)
    total = [sum(column) % 2**bits for column in zip(*(out["plain"][name] for name in alive), strict=True)]
    out |= {"total": total, "total_digest": sha(pack(total, bits)), "context": context, "plan_digest": planned}
    out["spec"] = {"degree": k, "threshold": t, "ring_bits": bits, "size": SIZE, "rounds": ROUNDS, "digest": HEX}
    return out


def hexed(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: hexed(one) for key, one in value.items()}
    return value


def main() -> None:
    five, nine = ([f"unit-{i}" for i in range(n)] for n in (5, 9))
    cases = {
        "complete": transcript("complete", five, 4, 3, 24, lost="unit-1", silent="unit-3"),
        "sparse": transcript("sparse", nine, 4, 4, 22, lost="unit-4", silent=None),
        "wide": transcript("wide", five, 4, 3, 32, lost="unit-0", silent=None),
    }
    Path(__file__).with_name("rounds.json").write_text(json.dumps(hexed(cases), indent=1) + "\n")


if __name__ == "__main__":
    main()
