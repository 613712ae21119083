"""The changes to the bundle of the test vectors, each with the rule by which the result is refused, or None."""

import base64
import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregation.pki.identity import IdentityKey
from edgeadapt.formats import container, dsse, jsontext
from edgeadapt.formats.bundle import TRUST
from edgeadapt.formats.container import Stored

BASE, ADAPTER = "base-manifest", "adapter-manifest"
BASE_PATH, MANIFEST, FILE = (
    "bundle/base/manifest.json",
    "bundle/adapters/int8.json",
    "bundle/adapters/int8.onnx_adapter",
)
A, B = "encoder.query.lora_A.weight", "encoder.query.lora_B.weight"
OFFSET = "encoder.silent.output_offset"
ORDER = 2**252 + 27742317777372353535851937790883648493  # RFC 8032, section 5.1
FIELD, ORDER_8 = 2**255 - 19, 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
PREFIX = bytes.fromhex("302a300506032b6570032100")  # RFC 8410, section 4

CARD = {
    "owner": "Zoë 灯",
    "purpose": "Lights",
    "data": "Phrases of volunteers",
    "license": "LicenseRef-Ours OR (MIT AND CC0-1.0)",
    "languages": ["de", "zh-Hant"],
}

Files = dict[str, Any]  # path → text, {"hex": …}, or None for a file that is removed
Case = dict[str, Any]


def key(name: str) -> IdentityKey:
    """A signing key that everybody knows."""
    return IdentityKey(hashlib.sha256(f"edgeadapt test vector, key of the {name}".encode()).digest())


VENDOR, OWNER, STRANGER = key("vendor"), key("owner"), key("stranger")


def cases(folder: Path) -> Iterator[Case]:
    """All cases for the bundle in ``folder``, which may lack ``cases.json``."""
    made = Made(folder)
    for part in (made.keys, made.envelopes, made.manifests, made.base, made.adapters, made.containers, made.numbers):
        yield from part()
    yield from made.stated()
    yield from made.seen()


def case(name: str, rule: str | None, files: Files, adapter: str = "int8") -> Case:
    """One case as ``cases.json`` has it."""
    return {"name": name, "rule": rule, "adapter": adapter, "files": files}


def signed(body: Any, kind: str, signer: IdentityKey = VENDOR) -> str:
    """A signed document around a value, or around a payload in bytes."""
    payload = body if isinstance(body, bytes) else jsontext.encode(body)
    return dsse.sign(payload, f"application/vnd.edgeadapt.{kind}.v1+json", signer).decode()


def pem(raw: bytes, kind: str = "PUBLIC KEY") -> str:
    """DER bytes in PEM form, whatever they are."""
    return f"-----BEGIN {kind}-----\n{base64.b64encode(raw).decode()}\n-----END {kind}-----\n"


class Made:
    """The bundle, and the ways to change it."""

    def __init__(self, folder: Path) -> None:
        self.trust = (folder / TRUST).read_text()
        self.base_text, self.text = ((folder / path).read_text() for path in (BASE_PATH, MANIFEST))
        self.base_body, self.body = (self._body(text) for text in (self.base_text, self.text))
        self.blob = (folder / FILE).read_bytes()
        self.int4 = (folder / FILE.replace("int8", "int4")).read_bytes()
        self.folder = folder

    @staticmethod
    def _body(text: str) -> dict[str, Any]:
        return json.loads(base64.b64decode(json.loads(text)["payload"]))  # type: ignore[no-any-return]

    def with_base(self, **fields: Any) -> Files:
        """The base manifest with other fields, signed."""
        return {BASE_PATH: signed(self.base_body | fields, BASE)}

    def with_fields(self, **fields: Any) -> Files:
        """The adapter manifest with other fields, signed."""
        return {MANIFEST: signed(self.body | fields, ADAPTER)}

    def with_payload(self, change: Callable[[bytes], bytes]) -> Files:
        """The adapter manifest with a payload that its fields cannot express, signed."""
        return {MANIFEST: signed(change(jsontext.encode(self.body)), ADAPTER)}

    def with_blob(self, blob: bytes, **fields: Any) -> Files:
        """Another adapter file, with its size and digest in the manifest, signed."""
        digest = hashlib.sha256(blob).hexdigest()
        return {FILE: {"hex": blob.hex()}} | self.with_fields(sha256=digest, size=len(blob), **fields)

    def with_tensors(self, changes: Stored, left_out: str = "", source: bytes | None = None, **fields: Any) -> Files:
        """The adapter file with other tensors, signed."""
        stored = container.unpack(source or self.blob) | changes
        return self.with_blob(container.pack({n: v for n, v in stored.items() if n != left_out}), **fields)

    def keys(self) -> Iterator[Case]:
        strong = [VENDOR.public.raw, OWNER.public.raw]
        weak = [y.to_bytes(32, "little") for y in (0, 1, FIELD - 1, ORDER_8, FIELD - ORDER_8, 1 + 2**255)]
        second = [y.to_bytes(32, "little") for y in (FIELD, FIELD + 1, 2**255 - 1)]
        yield case("no pinned keys", "trust", {TRUST: None})
        yield case("pinned keys inside the bundle alone", "trust", {TRUST: None, f"bundle/{TRUST}": self.trust})
        yield case("an empty trust.pem", "trust", {TRUST: ""})
        for where, text in (("before", f"key:\n{self.trust}"), ("after", f"{self.trust}x"), ("between", None)):
            between = self.trust.replace("KEY-----\n-----B", "KEY-----\n# owner\n-----B")
            yield case(f"text {where} the pinned keys", "trust", {TRUST: text or between})
        yield case(
            "a header in a pinned key", "trust", {TRUST: self.trust.replace("KEY-----\nM", "KEY-----\nA: b\n\nM", 1)}
        )
        yield case("a byte order mark", "trust", {TRUST: f"\ufeff{self.trust}"})
        yield case("a no-break space", "trust", {TRUST: {"hex": (self.trust.encode() + b"\xa0").hex()}})
        yield case("a certificate's label", "trust", {TRUST: pem(PREFIX + strong[0], "CERTIFICATE")})
        yield case(
            "a key of another algorithm",
            "trust",
            {TRUST: self.trust + pem(PREFIX.replace(b"\x70", b"\x6e") + strong[0])},
        )
        yield case("a key that is too short", "trust", {TRUST: self.trust + pem(PREFIX + strong[0][1:])})
        yield case("a key that is too long", "trust", {TRUST: self.trust + pem(PREFIX + strong[0] + b"\0")})
        for raw in weak:
            yield case(f"a pinned key of small order, {raw.hex()}", "trust", {TRUST: self.trust + pem(PREFIX + raw)})
        for raw in second:
            yield case(f"a second encoding of a point, {raw.hex()}", "trust", {TRUST: self.trust + pem(PREFIX + raw)})
        yield case("only the owner's key is pinned", "signature", {TRUST: pem(PREFIX + strong[1])})
        yield case("only a stranger's key is pinned", "signature", {TRUST: pem(PREFIX + STRANGER.public.raw)})
        yield case("keys in another order", None, {TRUST: "".join(pem(PREFIX + raw) for raw in reversed(strong))})
        yield case("lines end with a carriage return", None, {TRUST: self.trust.replace("\n", "\r\n")})
        yield case(
            "white space around keys and in base64", None, {TRUST: f"\n \n{self.trust.replace('MCow', 'MC ow')}\n\n"}
        )

    def envelopes(self) -> Iterator[Case]:
        document = json.loads(self.text)
        payload, kind, (signature,) = document["payload"], document["payloadType"], document["signatures"]
        sig = base64.b64decode(signature["sig"])
        number = int.from_bytes(sig[32:], "little")
        foreign = json.loads(signed(self.body, ADAPTER, STRANGER))["signatures"]
        base = json.loads(self.base_text)

        def other(name: str, rule: str | None, **fields: Any) -> Case:
            return case(name, rule, {MANIFEST: json.dumps(document | fields)})

        def of_sig(name: str, rule: str, raw: bytes) -> Case:
            return other(name, rule, signatures=[signature | {"sig": base64.b64encode(raw).decode()}])

        for name, text in (
            ("an empty file", ""),
            ("a truncated envelope", self.text[:-1]),
            ("an envelope with a byte after it", f"{self.text}x"),
            ("an envelope with a byte order mark", f"\ufeff{self.text}"),
            ("an envelope that is an array", f"[{self.text}]"),
            ("a key twice in an envelope", self.text.replace('{"payload":', '{"payload":"","payload":')),
            ("a key twice, once escaped", self.text.replace('{"payload":', '{"p\\u0061yload":"","payload":')),
            ("an envelope nested too deeply", "[" * 17 + "]" * 17),
            ("a number that is too large", self.text.replace('"signatures":', '"signatures":1e999,"x":')),
            ("a control character in a text", self.text.replace('"keyid":"', '"keyid":"\t')),
            ("half of a surrogate pair in a key id", self.text.replace('"keyid":"', '"keyid":"\\ud800')),
        ):
            yield case(name, "envelope", {MANIFEST: text})
        yield case("an envelope that is not UTF-8", "envelope", {MANIFEST: {"hex": self.text.encode("utf-16").hex()}})
        del document["payloadType"]
        yield other("a type is missing", "envelope")
        document["payloadType"] = kind
        for name, fields in (
            ("an additional key", {"extra": ""}),
            ("a payload without padding", {"payload": base64.b64encode(b"{}").decode().rstrip("=")}),
            ("a payload with a line break", {"payload": payload[:8] + "\n" + payload[8:]}),
            ("a payload of the URL alphabet", {"payload": "-_8="}),
            ("a payload with unused bits", {"payload": "e31="}),
            ("a payload that is no text", {"payload": 1}),
            ("a type that is no text", {"payloadType": None}),
            ("no signatures", {"signatures": []}),
            ("signatures that are an object", {"signatures": signature}),
            ("nine signatures", {"signatures": [signature] * 9}),
            ("a signature that is a text", {"signatures": [signature["sig"]]}),
            ("a signature without sig", {"signatures": [{"keyid": signature["keyid"]}]}),
            ("a signature with another key", {"signatures": [signature | {"alg": "none"}]}),
            ("a key id that is no text", {"signatures": [signature | {"keyid": None}]}),
        ):
            yield other(name, "envelope", **fields)
        yield other("a type in capitals", "type", payloadType=kind.upper())
        yield case("the base manifest in place of the adapter manifest", "type", {MANIFEST: self.base_text})
        yield case("the adapter manifest in place of the base manifest", "type", {BASE_PATH: self.text})
        yield other("another document's payload", "signature", payload=base["payload"])
        yield other("another document's signature", "signature", signatures=base["signatures"])
        yield other("a stranger's signature", "signature", signatures=foreign)
        yield other(
            "a stranger's signature under a pinned key's id",
            "signature",
            signatures=[foreign[0] | {"keyid": signature["keyid"]}],
        )
        flipped = bytes([sig[0] ^ 1]) + sig[1:]
        yield of_sig("a flipped bit in a signature", "signature", flipped)
        yield of_sig("a signature of no bytes", "signature", b"")
        yield of_sig("a signature with a byte after it", "signature", sig + b"\0")
        yield of_sig("S plus the order of the group", "signature", sig[:32] + (number + ORDER).to_bytes(32, "little"))
        bare = _sign_bytes(base64.b64decode(payload))
        yield of_sig("a signature on the payload alone", "signature", bare)
        yield other("no key id", None, signatures=[{"sig": signature["sig"]}])
        yield other("another key id", "signature", signatures=[signature | {"keyid": "someone"}])
        yield other("a stranger's signature first", None, signatures=[*foreign, signature])
        yield other("eight signatures", None, signatures=[*foreign * 7, signature])
        yield case("white space in an envelope", None, {MANIFEST: json.dumps(document, indent=2) + "\n"})
        yield case("escapes in an envelope", None, {MANIFEST: self.text.replace("payloadType", "payload\\u0054ype")})

    def manifests(self) -> Iterator[Case]:
        for name, change in (
            ("a payload that is not JSON", lambda raw: raw[:-1]),
            ("a payload that is an array", lambda raw: b"[" + raw + b"]"),
            ("a key twice in a payload", lambda raw: raw.replace(b'"rank":', b'"rank":1,"rank":')),
            ("NaN in a payload", lambda raw: raw.replace(b'"lora_alpha":4.5', b'"lora_alpha":NaN')),
            (
                "a payload nested too deeply",
                lambda raw: raw.replace(b'"parent":', b'"x":' + b"[" * 16 + b"]" * 16 + b',"parent":'),
            ),
            ("half of a surrogate pair in a label", lambda raw: raw.replace(b'"Light"', b'"\\ud800"')),
            ("a version with a fraction", lambda raw: raw.replace(b'"version":7', b'"version":7.0')),
            ("a version with an exponent", lambda raw: raw.replace(b'"version":7', b'"version":7e0')),
            ("a version with a leading zero", lambda raw: raw.replace(b'"version":7', b'"version":07')),
        ):
            yield case(name, "manifest", self.with_payload(change))
        without = {field: value for field, value in self.body.items() if field != "parent"}
        yield case("a field is missing", "manifest", {MANIFEST: signed(without, ADAPTER)})
        for name, fields in (
            ("an unknown field", {"extra": None}),
            ("a version that is a text", {"version": "7"}),
            ("a negative version", {"version": -1}),
            ("a version of 64 bits", {"version": 2**63}),
            ("a version that is true", {"version": True}),
            ("a digest in capitals", {"source": "AB" * 32}),
            ("a digest that is too short", {"sha256": "ab" * 31}),
            ("a digest with a line break", {"source": "ab" * 32 + "\n"}),
            ("an unknown format", {"format": "int2"}),
            ("labels that are null", {"labels": None}),
            ("a label that is a number", {"labels": ["Light", "Music", 1]}),
            ("a parent that is empty", {"parent": ""}),
            ("a configuration that is a text", {"peft_config": "LORA"}),
            ("a temperature of 0", {"temperature": 0}),
            ("a temperature above 20", {"temperature": 20.5}),
            ("a temperature that is a text", {"temperature": "1"}),
            ("an epsilon below 0", {"privacy": {"epsilon": -1, "delta": 1e-6}}),
            ("an epsilon without a delta", {"privacy": {"epsilon": 6.5}}),
            ("a policy that is no digest", {"policy": ""}),
            ("a card that is a text", {"card": "of us"}),
            ("a card without a license", {"card": {name: CARD[name] for name in CARD if name != "license"}}),
            ("a card with another field", {"card": CARD | {"version": "1"}}),
            ("a card without a language", {"card": CARD | {"languages": []}}),
            ("a card with a language that is a sentence", {"card": CARD | {"languages": ["German and English"]}}),
            ("a card whose license is a sentence", {"card": CARD | {"license": "Ask us, please!"}}),
            ("a card with a line break", {"card": CARD | {"purpose": "Lights\nand more"}}),
            ("a card with an escape sequence", {"card": CARD | {"owner": "\x1b[2J"}}),
            ("a card with a blank text", {"card": CARD | {"data": " "}}),
            ("a card with a text of 501 characters", {"card": CARD | {"data": "x" * 501}}),
        ):
            yield case(name, "manifest", self.with_fields(**fields))
        for name, fields in (
            ("an unknown task", {"task": "text-to-speech"}),
            ("a file outside of the folder", {"files": self.base_body["files"] | {"../x": "ab" * 32}}),
            ("a file with a leading dot", {"files": self.base_body["files"] | {".x": "ab" * 32}}),
            ("a dimension that is a number", {"slots": self.base_body["slots"] | {A: [40, "rank_0"]}}),
            ("independent rows that are a number", {"independent_rows": 1}),
            ("a runtime that is no version", {"onnxruntime": "1.x"}),
            ("an opset that is a text", {"opset": "20"}),
            ("a merged adapter that is no digest", {"merged": {"my-adapter": "LOKR"}}),
            ("a merged adapter whose method is no name", {"merged": {"ab" * 32: "LoKr by me"}}),
        ):
            yield case(name, "manifest", self.with_base(**fields))
        spaced = json.dumps(dict(reversed(self.body.items())), indent=1).encode()
        yield case("a card", None, self.with_fields(card=CARD))
        yield case("a card with texts of 500 characters", None, self.with_fields(card=CARD | {"data": "灯" * 500}))
        yield case("a payload with white space, escapes and another order", None, {MANIFEST: signed(spaced, ADAPTER)})

    def base(self) -> Iterator[Case]:
        files = dict(self.base_body["files"])
        for name in ("model.onnx", "tokenizer.json"):
            listed = {each: digest for each, digest in files.items() if each != name}
            yield case(f"no {name} is listed", "needed", self.with_base(files=listed))
        yield case("a language model without genai_config.json", "needed", self.with_base(task="text-generation"))
        yield case("an unlisted file", "unlisted", {"bundle/base/extra.onnx": ""})
        yield case("an unlisted file with a leading dot", None, {"bundle/base/.directory": ""})
        yield case("an unlisted file next to the adapters", None, {"bundle/adapters/readme.txt": ""})
        for name in files:
            path = f"bundle/base/{name}"
            raw = (self.folder / path).read_bytes()
            flipped = bytearray(raw)
            flipped[len(raw) // 2] ^= 1
            yield case(f"no {name}", "missing", {path: None})
            yield case(f"a flipped bit in {name}", "digest", {path: {"hex": flipped.hex()}})
        yield case("no base manifest", "missing", {BASE_PATH: None})
        yield case("a byte after tokenizer.json", "digest", {path: {"hex": raw.hex() + "0a"}})

    def adapters(self) -> Iterator[Case]:
        flipped = bytearray(self.blob)
        flipped[len(flipped) // 2] ^= 1
        for name in ("", "../int8", ".int8", "int8\n", "a" * 65):
            yield case(f"the name {name[:9]!r}", "name", {}, name)
        yield case(
            "another adapter's manifest", "name", {MANIFEST: (self.folder / MANIFEST.replace("8", "4")).read_text()}
        )
        yield case("no manifest of this name", "missing", {}, "int2")
        yield case("another base", "base", self.with_fields(base_digest="ab" * 32))
        name = MANIFEST.replace("int8", "fp32")  # of the shared adapter
        body = json.loads(base64.b64decode(json.loads((self.folder / name).read_text())["payload"]))
        governed = {name: signed(body | {"policy": "ab" * 32}, ADAPTER)}
        yield case("a policy that the base does not have", "policy", governed, "fp32")
        yield case("a personal adapter next to such a one", "policy", governed)
        yield case("a personal adapter that was made under a policy", None, self.with_fields(policy="ab" * 32))
        yield case("no adapter file", "missing", {FILE: None})
        yield case("a flipped bit in an adapter file", "digest", {FILE: {"hex": flipped.hex()}})
        yield case("a byte after an adapter file", "digest", {FILE: {"hex": self.blob.hex() + "00"}})
        yield case("a truncated adapter file", "digest", {FILE: {"hex": self.blob[:-1].hex()}})
        yield case("another adapter's file", "digest", {FILE: {"hex": self.int4.hex()}})
        yield case("another size", "digest", self.with_fields(size=len(self.blob) + 1))

    def containers(self) -> Iterator[Case]:
        """Adapter files that a signer damaged."""
        blob, places = self.blob, Places(self.blob)
        first, second = places.parameters[:2]
        empty = places.parameters[sorted(container.unpack(blob)).index("encoder.silent.lora_A.weight")]

        def put(at: int, form: str, value: int) -> bytes:
            return blob[:at] + struct.pack(form, value) + blob[at + struct.calcsize(form) :]

        for name, damaged in (
            ("an empty adapter file", b""),
            ("an adapter file of eight bytes", blob[:8]),
            ("half of an adapter file", blob[: len(blob) // 2]),
            ("another identifier", blob[:4] + b"TORX" + blob[8:]),
            ("a root outside of the file", put(0, "<I", len(blob))),
            ("another version of the format", put(places.field(places.root, 0), "<i", 2)),
            ("more parameters than there are", put(places.target(places.root, 3), "<I", 2**20)),
            ("a name outside of the file", put(places.field(first, 0), "<I", len(blob))),
            ("a name that is not UTF-8", put(places.target(first, 0) + 4, "<B", 0xFF)),
            ("an unknown type of numbers", put(places.field(first, 2), "<i", 7)),
            ("a negative dimension", put(places.target(first, 1) + 4, "<q", -3)),
            ("an empty tensor of a dimension that no memory has", put(places.target(empty, 1) + 4, "<q", 2**61)),
            ("another dimension than the bytes have", put(places.target(first, 1) + 4, "<q", 41)),
            ("fewer bytes than the dimensions say", put(places.target(first, 3), "<I", 1)),
            ("a tensor of an element more than the file has", put(places.target(first, 3), "<I", len(blob))),
            ("a name twice", self._twice(first, second, places)),
        ):
            yield case(name, "container", self.with_blob(damaged))

    def _twice(self, first: int, second: int, places: "Places") -> bytes:
        at, target = places.field(second, 0), places.target(first, 0)
        return self.blob[:at] + struct.pack("<I", (target - at) % 2**32) + self.blob[at + 4 :]

    def numbers(self) -> Iterator[Case]:
        """Types and scales that a signer got wrong."""
        stored = container.unpack(self.blob)
        scale, codes = stored[f"{A}#scale"], stored[A]
        nibbles = container.unpack(self.int4)
        halves = nibbles[f"{A}#scale"]
        bad = scale.copy()
        for name, value in (("zero", 0), ("negative", -1), ("infinite", np.inf), ("not a number", np.nan)):
            bad[0, 0] = value
            yield case(f"an int8 scale that is {name}", "numbers", self.with_tensors({f"{A}#scale": bad.copy()}))
        yield case("no int8 scale", "numbers", self.with_tensors({}, f"{A}#scale"))
        for name, changes in (
            ("int8 scales of another shape", {f"{A}#scale": scale.T.copy()}),
            ("int8 scales in float16", {f"{A}#scale": scale.astype(np.float16)}),
            ("a scale of no tensor", {"other#scale": scale}),
            ("a scale of a vector", {"head.bias#scale": scale}),
            ("a matrix in float32 in an int8 file", {A: codes.astype(np.float32)}),
            ("a matrix in float16 in an int8 file", {A: codes.astype(np.float16)}),
            ("a vector in float16", {"head.bias": stored["head.bias"].astype(np.float16)}),
            ("an empty matrix in int8", {"encoder.silent.lora_A.weight": np.zeros((5, 0), np.int8)}),
            ("infinity in a vector", {"head.bias": np.array([0, np.inf, 0], np.float32)}),
            ("a product that is not finite", {f"{A}#scale": np.full_like(scale, 3e38)}),
            ("a vector in int8", {OFFSET: np.ones((1, 5), np.int8), f"{OFFSET}#scale": np.ones((1, 1), np.float32)}),
            ("four bits in an int8 file", {A: nibbles[A], f"{A}#scale": halves}),
        ):
            yield case(name, "numbers", self.with_tensors(changes))
        for name, changes in (
            ("an int4 scale that is infinite", {f"{A}#scale": np.full_like(halves, np.inf)}),
            ("int4 scales in float32", {f"{A}#scale": halves.astype(np.float32)}),
            ("too few int4 scales", {f"{A}#scale": halves[:, :1].copy()}),
            ("float16 in an int4 file", {A: codes.astype(np.float16)}),
        ):
            yield case(name, "numbers", self.with_tensors(changes, source=self.int4, format="int4"))
        for name, changes in (
            ("int4 scales that are negative, zero and subnormal", {f"{A}#scale": _odd(halves)}),
            ("an int8 matrix of an even width in an int4 file", {A: codes, f"{A}#scale": scale}),
        ):
            yield case(name, None, self.with_tensors(changes, source=self.int4, format="int4"))

    def stated(self) -> Iterator[Case]:
        """What an adapter must be, as its manifest and the base state it."""
        ones = np.ones((1, 1), np.float32)
        silent = "encoder.silent.lora_A.weight"
        for name, files in (
            ("a tensor is missing", self.with_tensors({}, silent)),
            ("a tensor without a slot", self.with_tensors({"other": np.zeros(1, np.float32)})),
            ("a pair of two ranks", self.with_tensors({silent: np.zeros((5, 1), np.int8), f"{silent}#scale": ones})),
            ("another number of dimensions", self.with_tensors({"head.bias": np.zeros((3, 0), np.float32)})),
            ("a vector that is given twice", self.with_tensors({OFFSET: np.zeros((2, 5), np.float32)})),
            ("another number of inputs", self.with_tensors({silent: np.zeros((4, 0), np.float32)})),
            ("other rows of a head than of its bias", self.with_tensors({"head.bias": np.zeros(4, np.float32)})),
        ):
            yield case(name, "slots", files)
        offset = {OFFSET: np.array([[0.5, -1, 0, 2, -0.25]], np.float32)}
        shapes = json.loads((self.folder / "expected.json").read_text())["adapters"]["int8"]["tensors"]
        shapes[OFFSET] = {"shape": [1, 5]}
        yield case("a vector that is given", None, self.with_tensors(offset, layout_digest=_layout(shapes)))
        yield case("a rank above the base's limit", "rank", self.with_base(max_rank=2))
        yield case("another rank than the stated one", "rank", self.with_fields(rank=2))
        yield case("another layout", "layout", self.with_fields(layout_digest="ab" * 32))
        for name, labels in (
            ("too few labels", ["Light", "Music"]),
            ("a label twice", ["Light", "Light", "Music"]),
            ("a blank label", ["Light", "  ", "Music"]),
            ("a label of 257 characters", ["Light", "a" * 257, "Music"]),
            ("a line break in a label", ["Light", "a\nb", "Music"]),
            ("a no-break space in a label", ["Light", "a\u00a0b", "Music"]),
            ("a direction mark in a label", ["Light", "a\u202eb", "Music"]),
            ("a private character in a label", ["Light", "a\ue000b", "Music"]),
        ):
            yield case(name, "labels", self.with_fields(labels=labels))
        files = self.base_body["files"] | {"genai_config.json": hashlib.sha256(b"{}").hexdigest()}
        generation = self.with_base(task="text-generation", files=files)
        yield case("labels for a language model", "labels", generation | {"bundle/base/genai_config.json": "{}"})
        long = ["a b", "\U0001f4a1" * 256, "\u706f"]
        yield case("labels of 256 characters and of any script", None, self.with_fields(labels=long))

    def seen(self) -> Iterator[Case]:
        base, path = self.body["base_digest"], "trust.seen.json"
        own = {"content": _content(self.body), "version": 7}
        other = {"content": "ab" * 32, "version": 7}

        def noted(value: Any) -> Files:
            return {path: json.dumps(value)}

        for name, value in (
            ("accepted versions in an array", []),
            ("accepted versions without content", {base: {"int8": 7}}),
            ("an unknown field of an accepted version", {base: {"int8": own | {"x": 0}}}),
            ("an accepted version that is a text", {base: {"int8": own | {"version": "7"}}}),
            ("a base in capitals", {base.upper(): {}}),
            ("a name of 65 characters", {base: {"a" * 65: own}}),
        ):
            yield case(name, "seen", noted(value))
        yield case("accepted versions that are cut off", "seen", {path: "{"})
        yield case("a version below the accepted one", "version", noted({base: {"int8": own | {"version": 8}}}))
        yield case("another content under the accepted version", "content", noted({base: {"int8": other}}))
        yield case("the accepted version again", None, noted({base: {"int8": own}}))
        yield case("a version above the accepted one", None, noted({base: {"int8": other | {"version": 6}}}))
        yield case("a higher version of another adapter", None, noted({base: {"int4": other | {"version": 9}}}))
        yield case("a higher version for another base", None, noted({"ab" * 32: {"int8": other | {"version": 9}}}))
        whole = {"content": _content(self.body | {"temperature": 2.0}), "version": 7}
        files = noted({base: {"int8": whole}}) | self.with_fields(temperature=2)
        yield case("the accepted version with an integer as temperature", None, files)
        same, bound = noted({base: {"int8": own}}), {"epsilon": 8.5, "delta": 1e-6}
        yield case("the accepted version with another epsilon", None, same | self.with_fields(privacy=bound))
        yield case("the accepted version, other temperature", "content", same | self.with_fields(temperature=2.5))
        files = noted({base: {"fp32": own, "int8": own}}) | self.with_fields(version=2**53 - 1)
        yield case("the highest version that every reader takes", None, files)


class Places:
    """Where the parts of an adapter file are, so that single bytes can be changed."""

    def __init__(self, blob: bytes) -> None:
        self.blob = blob
        self.root = self._number(0)
        at = self.target(self.root, 3)
        elements = (at + 4 + 4 * i for i in range(self._number(at)))
        self.parameters = [element + self._number(element) for element in elements]

    def _number(self, at: int, form: str = "<I") -> int:
        (value,) = struct.unpack_from(form, self.blob, at)
        return int(value)

    def field(self, table: int, index: int) -> int:
        """The position of a field of a table."""
        vtable = table - self._number(table, "<i")
        return table + self._number(vtable + 4 + 2 * index, "<H")

    def target(self, table: int, index: int) -> int:
        """The position of what a field refers to."""
        at = self.field(table, index)
        return at + self._number(at)


def _odd(scales: Any) -> Any:
    changed = scales.copy()
    changed[0, 0], changed[1, 0], changed[2, 0] = -changed[0, 0], 0, 2**-24
    return changed


def _layout(tensors: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name in sorted(tensors):
        shape = tensors[name]["shape"]
        lora = name.endswith((".lora_A.weight", ".lora_B.weight"))
        rows.append([f"base_model.model.{name}", shape[::-1] if lora else shape])
    return hashlib.sha256(jsontext.encode(rows)).hexdigest()


def _content(body: dict[str, Any]) -> str:
    blank = {"name": "", "sha256": "", "format": "", "version": 0, "size": 0, "privacy": None}
    return hashlib.sha256(jsontext.encode(body | blank)).hexdigest()


def _sign_bytes(message: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(VENDOR.raw).sign(message)
