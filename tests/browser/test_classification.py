"""The page gives the answers of the native session, for every adapter and number format."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aggregation.pki.identity import IdentityKey
from client.inference.session import ClassificationSession
from edgeadapt.formats.manifest import Format
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.exported import ExportedBase

pytestmark = pytest.mark.slow

PHRASES = ("turn on the kitchen lights", "Lock the DOOR", "set a timer for ten minutes", "unlock")
RANK = """(async () => {
  const { Client } = await import('/client.js');
  const client = new Client();
  await client.open();
  await client.use(%r);
  const found = [];
  for (const phrase of %r) found.push((await client.rank(phrase, 10)).labels);
  return found;
})()"""


def in_page(page: Any, name: str, phrases: list[str]) -> list[dict[str, float]]:
    rankings = page.evaluate(RANK % (name, phrases))
    return [{row["label"]: row["probability"] for row in ranking} for ranking in rankings]


def native(bundle: Path, name: str, phrases: list[str]) -> list[dict[str, float]]:
    session = ClassificationSession.open(bundle)
    return [{p.label: p.probability for p in ranking} for ranking in session.rank(phrases, name, 10)]


def same(left: list[dict[str, float]], right: list[dict[str, float]], within: float = 1e-4) -> None:
    assert [list(each) for each in left] == [list(each) for each in right]
    for one, other in zip(left, right, strict=True):
        assert one == pytest.approx(other, abs=within)


@pytest.mark.parametrize("form", ["fp32", "fp16", "int8", "int4"])
def test_an_adapter_of_any_format_answers_as_natively(
    form: Format,
    page: Any,
    serve: Callable[[Path], str],
    bundle: Path,
    exported: ExportedBase,
    source: Callable[..., AdapterSource],
    vendor: IdentityKey,
) -> None:
    write_bundle(bundle, exported, [source()], key=vendor, form=form)
    page.goto(serve(bundle))
    same(in_page(page, "global", list(PHRASES)), native(bundle, "global", list(PHRASES)))


def test_the_temperature_of_an_adapter_divides_its_logits_as_natively(
    page: Any,
    serve: Callable[[Path], str],
    bundle: Path,
    exported: ExportedBase,
    source: Callable[..., AdapterSource],
    vendor: IdentityKey,
) -> None:
    before = native(bundle, "global", list(PHRASES))
    write_bundle(bundle, exported, [replace(source(version=4), temperature=2.5)], key=vendor)
    page.goto(serve(bundle))
    found = in_page(page, "global", list(PHRASES))
    same(found, native(bundle, "global", list(PHRASES)), 1e-6)
    assert all(max(one.values()) < max(other.values()) for one, other in zip(found, before, strict=True))


def test_a_base_in_int8_answers_as_natively_up_to_the_rounding_of_activations(
    page: Any,
    serve: Callable[[Path], str],
    bundle: Path,
    exported_int8: ExportedBase,
    source: Callable[..., AdapterSource],
    vendor: IdentityKey,
) -> None:
    write_bundle(bundle, exported_int8, [source()], key=vendor)
    page.goto(serve(bundle))
    same(in_page(page, "global", list(PHRASES)), native(bundle, "global", list(PHRASES)), 0.03)
