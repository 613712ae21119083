"""Makes rounds.json: complete rounds, byte for byte, from docs/reference/protocol.md alone. Shares no code with the
project.

    python tests/vectors/make_rounds.py

Run it again only if the protocol changes: the file is frozen. It holds what each party sends, and messages that must be
refused, each signed by the right party and wrong in one point.
"""

import datetime as dt
import hashlib
import json
import struct
from dataclasses import dataclass, field
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

# Bytes


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def stream(label: str, n: int) -> bytes:
    """Bytes in place of randomness."""
    return b"".join(sha(f"{label}/{i}".encode()) for i in range(-(-n // 32)))[:n]


def u(value: int, size: int) -> bytes:
    return value.to_bytes(size, "big")


def upload(packed: bytes, header: bytes) -> bytes:
    return packed + header + u(len(header), 4)


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


NO_NOISE = b"\x00"

# Cryptography


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
    """The value at x of the polynomial with the coefficients ``drawn``, 48 bytes each, highest power first."""
    coefficients = [int.from_bytes(drawn[i : i + 48], "big") for i in range(0, len(drawn), 48)]
    powers = range(len(coefficients), 0, -1)
    value = sum(c * x**power for c, power in zip(coefficients, powers, strict=True))
    return u((value + int.from_bytes(secret, "big")) % P, 33)


def mask(key: bytes, bits: int) -> list[int]:
    size = 2 if bits <= 16 else 4
    raw = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(size * SIZE))
    return [int.from_bytes(raw[i : i + size], "little") % 2**bits for i in range(0, len(raw), size)]


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


# One session and its first round


@dataclass
class Case:
    """A session and its first round; ``out`` is what the file holds of it.

    ``t``: shares that reconstruct a secret. ``least``: fewest survivors. ``quorum``: signatures in the unmask request.
    ``dropouts`` send no masked input; ``silent`` devices sign no survivor set and reveal no shares. ``groups`` have a
    minimum of 2 devices.
    """

    label: str
    names: list[str]
    k: int
    t: int
    least: int
    bits: int
    dropouts: list[str]
    silent: list[str]
    groups: int = 1
    out: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Ed25519PrivateKey] = field(default_factory=dict)
    share_key: dict[str, bytes] = field(default_factory=dict)
    mask_key: dict[tuple[str, int], bytes] = field(default_factory=dict)  # device and round →
    seed: dict[tuple[str, int], bytes] = field(default_factory=dict)
    neighbors: dict[str, list[str]] = field(default_factory=dict)
    held: dict[tuple[str, str], list[bytes]] = field(default_factory=dict)  # dealer, holder → seed, key, seed, key …
    encrypted_shares: dict[str, dict[str, bytes]] = field(default_factory=dict)
    offered: bytes = b""
    context: bytes = b""

    @property
    def complete(self) -> bool:
        return self.k == len(self.names) - 1

    @property
    def quorum(self) -> int:
        return self.t if self.complete else self.least

    def group(self, number: int) -> list[str]:
        order = sorted(self.names, key=lambda name: sha(b"edgeadapt/group/1\x00", bytes.fromhex(HEX), name.encode()))
        return order[number :: self.groups]

    def make(self) -> dict[str, Any]:
        self.parties()
        self.check_in()
        self.offer()
        self.roster()
        self.shares()
        self.plan_and_inputs()
        return self.out | {"spec": self.numbers(), "dropouts": self.dropouts, "silent": self.silent}

    def numbers(self) -> dict[str, Any]:
        own = {"degree": self.k, "threshold": self.t, "minimum_survivors": self.least, "groups": self.groups}
        return own | {"ring_bits": self.bits, "size": SIZE, "rounds": ROUNDS, "digest": HEX}

    def coordinator(self, tag: str, body: bytes) -> bytes:
        return message(self.keys["coordinator"], tag, body)

    def refuse(self, step: str, who: str, why: str, raw: bytes) -> None:
        """Record a message that ``who`` must refuse from the coordinator, or the coordinator from ``who``."""
        self.out.setdefault("refused", []).append({"step": step, "device": who, "why": why, "message": raw})

    def parties(self) -> None:
        seeds = {who: stream(f"{self.label}/identity/{who}", 32) for who in (*self.names, "authority", "coordinator")}
        self.keys = {who: Ed25519PrivateKey.from_private_bytes(seed) for who, seed in seeds.items()}
        authority = self.keys["authority"]
        self.out["root"] = certificate("vectors", authority, authority, True)
        self.out["certificates"] = {n: certificate(n, self.keys[n], authority, False) for n in self.names}
        self.out["identities"] = seeds

    def check_in(self) -> None:
        """Node numbers count from 1; the first device has joined no session before."""
        self.out |= {"challenges": {}, "check_ins": {}}
        for node, name in enumerate(self.names, 1):
            asked = stream(f"{self.label}/challenge/{name}", 32) + u(node, 8)
            joined = b"\x00" if node == 1 else b"\x01" + stream(f"{self.label}/last-offer/{name}", 32)
            body = digest("challenge", asked) + blob(self.out["certificates"][name]) + joined
            self.out["challenges"][name] = self.coordinator("challenge", asked)
            self.out["check_ins"][name] = message(self.keys[name], "check-in", body)
        first, second, *_ = self.names
        asked, own = stream(f"{self.label}/challenge/{first}", 32), blob(self.out["certificates"][first])
        self.refuse("challenge", first, "for another node", self.out["challenges"][second])
        self.refuse("challenge", first, "signed by a device", message(self.keys[second], "challenge", asked + u(1, 8)))
        for why, who, body in (
            ("for the challenge of another node", first, digest("challenge", asked + u(2, 8)) + own + b"\x00"),
            ("for another nonce", first, digest("challenge", bytes(32) + u(1, 8)) + own + b"\x00"),
            ("another device's certificate", second, digest("challenge", asked + u(1, 8)) + own + b"\x00"),
        ):
            self.refuse("check-in", first, why, message(self.keys[who], "check-in", body))

    def offer(self) -> None:
        self.out["session"] = stream(f"{self.label}/session", 32)
        certificates = [blob(self.out["certificates"][name]) for name in self.names]
        body = self.out["session"] + self.spec(self.t, self.least) + many(certificates)
        self.out["offer"], self.offered = self.coordinator("offer", body), digest("offer", body)
        first = self.names[0]
        self.refuse("offer", first, "two groups can reconstruct a secret", self.weak_offer(t=2, least=2))
        self.refuse("offer", first, "signed by a device", message(self.keys[first], "offer", body))
        self.refuse("offer", first, "a trailing byte", self.coordinator("offer", body + b"\x00"))
        reversed_ = self.out["session"] + self.spec(self.t, self.least) + many(certificates[::-1])
        self.refuse("offer", first, "certificates out of order", self.coordinator("offer", reversed_))
        twice = self.out["session"] + self.spec(self.t, self.least) + many(certificates[:1] + certificates)
        self.refuse("offer", first, "a repeated device", self.coordinator("offer", twice))
        zero = body.replace(real(2.5), real(-0.0))
        self.refuse("offer", first, "a negative zero", self.coordinator("offer", zero))
        if not self.complete:
            half = len(self.names) // 2
            self.refuse(
                "offer", first, "two groups can sign different survivor sets", self.weak_offer(t=self.t, least=half)
            )

    def weak_offer(self, *, t: int, least: int) -> bytes:
        certificates = [blob(self.out["certificates"][name]) for name in self.names]
        return self.coordinator("offer", self.out["session"] + self.spec(t, least) + many(certificates))

    def spec(self, t: int, least: int) -> bytes:
        vector = many([text("delta") + u(SIZE, 4) + real(1.0) + real(0.0)]) + u(self.bits, 1) + u(len(self.names), 4)
        spec = b"".join(u(v, 4) for v in (ROUNDS, t, least, self.k)) + vector + real(2.5) + u(7, 8)
        return (
            spec
            + NO_NOISE
            + text(HEX)
            + text(HEX)
            + text("active")
            + (b"\x01" + u(self.groups, 4) + u(2, 4) if self.groups > 1 else b"\x00")
        )

    def roster(self) -> None:
        draws = {name: stream(f"{self.label}/join/{name}", 32 * (1 + 2 * ROUNDS)) for name in self.names}
        for name, drawn in draws.items():
            self.share_key[name] = drawn[:32]
            for r in range(1, ROUNDS + 1):
                self.mask_key[name, r] = drawn[64 * r - 32 : 64 * r]
                self.seed[name, r] = drawn[64 * r : 64 * r + 32]
        adverts = {name: message(self.keys[name], "advert", self.advert(name)) for name in self.names}
        body = self.offered + many([blob(adverts[name]) for name in self.names])
        self.context = sha(b"edgeadapt/context/1\x00", self.offered, digest("roster", body))
        self.out |= {"join": draws, "adverts": adverts, "roster": self.coordinator("roster", body)}
        self.out["context"] = self.context
        self.refuse_adverts(adverts)

    def advert(self, name: str) -> bytes:
        committed = [
            sha(b"edgeadapt/commitment/1\x00", self.offered, u(r, 4), name.encode(), b"\x00", self.seed[name, r])
            for r in range(1, ROUNDS + 1)
        ]
        publics = [public(self.mask_key[name, r]) for r in range(1, ROUNDS + 1)]
        return self.offered + text(name) + public(self.share_key[name]) + many(publics) + many(committed)

    def refuse_adverts(self, adverts: dict[str, bytes]) -> None:
        first, second, *_ = self.names
        body, key = self.advert(first), self.keys[first]
        self.refuse("advert", first, "another device's", adverts[second])
        self.refuse("advert", first, "for another offer", message(key, "advert", bytes(32) + body[32:]))
        small = body.replace(public(self.share_key[first]), bytes(32))
        self.refuse("advert", first, "a key of small order", message(key, "advert", small))
        rest = [blob(adverts[name]) for name in self.names[2:]]
        forged = message(self.keys["coordinator"], "advert", self.advert(second))
        for why, shown in {
            "without the device's own advert": [blob(adverts[second]), *rest],
            "a repeated advert": [blob(adverts[first]), blob(adverts[first]), blob(adverts[second]), *rest],
            "an advert signed by the coordinator": [blob(adverts[first]), blob(forged), *rest],
            "too few adverts": [blob(adverts[first])],
        }.items():
            self.refuse("roster", first, why, self.coordinator("roster", self.offered + many(shown)))

    def shares(self) -> None:
        order = sorted(self.names, key=lambda name: sha(b"edgeadapt/harary/1\x00", self.context, name.encode()))
        steps, n = range(-(self.k // 2), self.k // 2 + 1), len(self.names)
        for at, name in enumerate(order):
            around = self.names if self.complete else [order[(at + step) % n] for step in steps]
            self.neighbors[name] = sorted(set(around) - {name})
        drawn = {name: stream(f"{self.label}/deal/{name}", 96 * (self.t - 1) * ROUNDS) for name in self.names}
        for dealer in self.names:
            for holder in (dealer, *self.neighbors[dealer]):
                self.deal(dealer, holder, drawn[dealer])
        self.out |= {"deal": drawn, "neighbors": {name: self.neighbors[name] for name in self.names}}
        body = {d: self.context + text(d) + table(self.encrypted_shares[d]) for d in self.names}
        self.out["shares"] = {d: message(self.keys[d], "shares", body[d]) for d in self.names}
        first = self.names[0]
        left = dict(list(self.encrypted_shares[first].items())[1:])
        for why, raw in {
            "no shares for a neighbor": self.context + text(first) + table(left),
            "of another session": bytes(32) + body[first][32:],
        }.items():
            self.refuse("shares", first, why, message(self.keys[first], "shares", raw))

    def deal(self, dealer: str, holder: str, drawn: bytes) -> None:
        x, shares, size = self.names.index(holder) + 1, [], 48 * (self.t - 1)
        for r in range(1, ROUNDS + 1):
            polynomials = drawn[2 * size * (r - 1) : 2 * size * r]
            shares.append(share(self.seed[dealer, r], polynomials[:size], x))
            shares.append(share(self.mask_key[dealer, r], polynomials[size:], x))
        self.held[dealer, holder] = shares
        if holder != dealer:
            secret = exchange(self.share_key[dealer], public(self.share_key[holder]))
            key = derive(secret, b"edgeadapt/share-encryption/1", self.context, dealer.encode(), holder.encode())
            sealed = AESGCM(key).encrypt(bytes(12), b"".join(shares), self.context)
            digests = many([sha(b"edgeadapt/share/1\x00", one)[:16] for one in shares])
            self.encrypted_shares.setdefault(dealer, {})[holder] = blob(sealed) + digests

    def plan(self, *, number: int = 1, members: list[str] | None = None, former: tuple[str, ...] = ()) -> bytes:
        named = many([text(name) for name in members or self.names])
        return (
            self.context
            + u(number, 4)
            + named
            + u(3, 8)
            + text(HEX)
            + blob(b"train")
            + many([text(name) for name in former])
        )

    def plan_and_inputs(self) -> None:
        planned = digest("plan", self.plan())
        encrypted_shares = {
            name: table({d: self.encrypted_shares[d][name] for d in self.neighbors[name]}) for name in self.names
        }
        self.out["plan_digest"] = planned
        self.out["assignments"] = {
            n: self.coordinator("assignment", self.plan() + encrypted_shares[n]) for n in self.names
        }
        self.refuse_plans(encrypted_shares)
        self.out["plain"] = {n: [b % 2**self.bits for b in stream(f"{self.label}/plain/{n}", SIZE)] for n in self.names}
        self.out["masked"], vectors = {}, {}
        for name in self.names:
            packed = pack(self.masked(name, planned), self.bits)
            vectors[name] = sha(packed)
            header = message(self.keys[name], "masked-input", planned + text(name) + vectors[name])
            self.out["masked"][name] = upload(packed, header)
        self.refuse_inputs(planned)
        self.unmask(planned, vectors)

    def refuse_plans(self, encrypted_shares: dict[str, bytes]) -> None:
        first, *others = self.names
        gone = self.group(1)[1:] if self.groups > 1 and first in self.group(0) else []
        left, former = [name for name in self.names if name not in gone], tuple(sorted(gone))
        grouped = {"a group of one": self.plan(members=left, former=former)} if gone else {}
        for why, plan in {
            "a round beyond the session": self.plan(number=ROUNDS + 1),
            "round zero": self.plan(number=0),
            "without the device": self.plan(members=others),
            "members out of order": self.plan(members=[*others, first]),
            "too few members": self.plan(members=[first]),
            "of another session": bytes(32) + self.plan()[32:],
            "a former member that is a member": self.plan(former=(others[0],)),
            **grouped,
        }.items():
            self.refuse("assignment", first, why, self.coordinator("assignment", plan + encrypted_shares[first]))

    def masked(self, name: str, planned: bytes) -> list[int]:
        masked = list(self.out["plain"][name])
        own = derive(self.seed[name, 1], b"edgeadapt/self-mask/1", self.context, planned, name.encode())
        secrets = [(own, 1)]
        same = next(one for one in map(self.group, range(self.groups)) if name in one)
        for other in [each for each in self.neighbors[name] if self.groups == 1 or each in same]:
            low, high = sorted((name, other))
            secret = exchange(self.mask_key[name, 1], public(self.mask_key[other, 1]))
            bound = (b"edgeadapt/pair-mask/1", self.context, planned, low.encode(), high.encode())
            secrets.append((derive(secret, *bound), 1 if name < other else -1))
        for key, way in secrets:
            stream_of = mask(key, self.bits)
            masked = [(value + way * m) % 2**self.bits for value, m in zip(masked, stream_of, strict=True)]
        return masked

    def refuse_inputs(self, planned: bytes) -> None:
        who = next(name for name in self.names if name not in self.dropouts)
        good, key = self.out["masked"][who], self.keys[who]
        packed = good[: (SIZE * self.bits + 7) // 8]
        other = message(key, "masked-input", bytes(32) + text(who) + sha(packed))
        longer = message(key, "masked-input", planned + text(who) + sha(packed + b"\x00"))
        changed = packed[:-1] + bytes([packed[-1] ^ 1])
        self.refuse("masked-input", who, "for another plan", upload(packed, other))
        self.refuse("masked-input", who, "too long", upload(packed + b"\x00", longer))
        self.refuse("masked-input", who, "another vector than the signed one", changed + good[len(packed) :])
        if SIZE * self.bits % 8:
            spare = packed[:-1] + bytes([packed[-1] | 0x80])
            header = message(key, "masked-input", planned + text(who) + sha(spare))
            self.refuse("masked-input", who, "an unused bit set", upload(spare, header))

    def unmask(self, planned: bytes, vectors: dict[str, bytes]) -> None:
        survived = [name for name in self.names if name not in self.dropouts]
        signers = [name for name in survived if name not in self.silent]
        survivors = planned + table({name: vectors[name] for name in survived})
        surviving = digest("survivors", survivors)
        shown = signers[: self.quorum] if self.groups == 1 else signers
        statement = {name: surviving + text(name) for name in signers}
        signed = {name: sign(self.keys[name], "consistency-signature", statement[name]) for name in shown}
        self.out["unmask"] = self.coordinator("unmask", survivors + table(signed))
        self.out["survivors"] = self.coordinator("survivors", survivors)
        self.out["consistency_signatures"] = {
            n: message(self.keys[n], "consistency-signature", statement[n]) for n in signers
        }
        self.out["unmask_responses"] = {n: self.response(n, surviving, survived) for n in signers}
        parts = [[n for n in self.group(i) if n in survived] for i in range(self.groups)]
        plain = [zip(*(self.out["plain"][n] for n in part), strict=True) for part in parts]
        totals = [[sum(column) % 2**self.bits for column in columns] for columns in plain]
        digests = [sha(pack(total, self.bits)) for total in totals]
        joined = digests[0] if self.groups == 1 else sha(b"edgeadapt/sums/1\x00", *digests)
        self.out |= {"totals": totals, "total_digest": joined}
        self.refuse_survivors(planned, {name: vectors[name] for name in survived}, signers[0])
        self.refuse_unmask(survivors, signed, signers[0])

    def response(self, name: str, surviving: bytes, survived: list[str]) -> bytes:
        around = sorted({name, *self.neighbors[name]})
        seeds_of = table({d: self.held[d, name][0] for d in around if d in survived})
        keys_of = table({d: self.held[d, name][1] for d in around if d not in survived})
        return message(self.keys[name], "unmask-response", surviving + text(name) + seeds_of + keys_of)

    def refuse_survivors(self, planned: bytes, vectors: dict[str, bytes], who: str) -> None:
        others = {name: vector for name, vector in vectors.items() if name != who}
        for why, body in {
            "for another plan": bytes(32) + table(vectors),
            "without the device": planned + table(others),
            "with another vector of the device": planned + table({**vectors, who: bytes(32)}),
            "with a stranger": planned + table({**vectors, "stranger": bytes(32)}),
            "too few": planned + table({who: vectors[who]}),
            "out of order": planned + many([text(n) + v for n, v in sorted(vectors.items(), reverse=True)]),
        }.items():
            self.refuse("survivors", who, why, self.coordinator("survivors", body))

    def refuse_unmask(self, survivors: bytes, signed: dict[str, bytes], who: str) -> None:
        one, *rest = signed
        for why, shown in {
            "one signature too few": {name: signed[name] for name in rest[-self.quorum + 1 :]},
            "a signature of zeros": {**signed, one: bytes(64)},
            "a signature of another device": {**signed, one: signed[rest[0]]},
            "a signature of a dropout": {**signed, self.dropouts[0]: signed[one]},
        }.items():
            self.refuse("unmask", who, why, self.coordinator("unmask", survivors + table(shown)))
        response, key = self.out["unmask_responses"][who], self.keys[who]
        start = len(b"EA\x01") + len(text("unmask-response")) + 4
        body = response[start:-64]
        other = message(key, "unmask-response", bytes(32) + body[32:])
        self.refuse("unmask-response", who, "for another survivor set", other)
        stranger = body[: 32 + len(text(who))] + table({self.dropouts[0]: bytes(33)}) + table({})
        self.refuse("unmask-response", who, "a share of the other kind", message(key, "unmask-response", stranger))


def hexed(value: Any) -> Any:
    if isinstance(value, bytes | dict):
        return value.hex() if isinstance(value, bytes) else {key: hexed(one) for key, one in value.items()}
    return [hexed(one) for one in value] if isinstance(value, list) else value


def names(count: int) -> list[str]:
    return [f"unit-{i:x}" for i in range(count)]


CASES = (
    Case("complete", names(5), k=4, t=3, least=3, bits=24, dropouts=["unit-1"], silent=["unit-3"]),
    Case("narrow", names(5), k=4, t=3, least=3, bits=16, dropouts=["unit-2"], silent=["unit-4"]),
    Case("wide", names(5), k=4, t=3, least=3, bits=32, dropouts=["unit-0"], silent=[]),
    Case("sparse", names(9), k=4, t=4, least=5, bits=22, dropouts=["unit-4"], silent=[]),
    Case("groups", names(8), k=7, t=5, least=5, bits=24, dropouts=["unit-1"], silent=["unit-3"], groups=2),
    Case("large", names(13), k=8, t=6, least=8, bits=19, dropouts=["unit-2", "unit-7"], silent=["unit-a"]),
)


def main() -> None:
    made = {case.label: hexed(case.make()) for case in CASES}
    Path(__file__).with_name("rounds.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
