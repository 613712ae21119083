"""A damaged file is refused by the page in one line, and the adapter in use goes on.

``js/vectors.test.mjs`` has the other refusals.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aggregation.pki.identity import IdentityKey
from edgeadapt.formats import dsse
from edgeadapt.formats.bundle import MODEL, TOKENIZER, WEB_MODEL, WEIGHTS
from export.bundle.write import AdapterSource, add_adapter, write_bundle
from export.onnx.exported import ExportedBase
from tests.support.bundles import flip
from tests.support.nodetab import NodeTab

pytestmark = pytest.mark.slow

BASE_FILES = ["manifest.json", MODEL, WEIGHTS, WEB_MODEL, TOKENIZER]
ADAPTER_FILES = ["anna.json", "anna.onnx_adapter"]
PHRASE = "turn on the lights"
START = """(async () => {
  globalThis.engine = await opened();
  await engine.use('global');
  globalThis.before = JSON.stringify((await engine.rank(%r, 4)).labels);
})()"""


class Device:
    """A tab with the adapter ``global`` in use, and the bundle it came from."""

    def __init__(self, tab: NodeTab, bundle: Path) -> None:
        self.tab, self.bundle = tab, bundle
        tab.open(bundle)
        tab.evaluate(START % PHRASE)

    def refuses(self, call: str, kind: str, about: str | None) -> str:
        """The message of the error with which ``call`` fails; the tab answers as before."""
        error: dict[str, str] = self.tab.error(call)
        assert error["name"] == kind, error
        assert about in (None, error["about"]), error
        assert "\n" not in error["message"]
        assert len(error["message"]) < 400
        assert self.tab.evaluate(f"engine.rank({PHRASE!r}, 4).then((r) => JSON.stringify(r.labels) === before)")
        return error["message"]

    def refuses_adapter(self, kind: str, about: str | None, name: str = "anna") -> str:
        return self.refuses(f"engine.use({name!r})", kind, about)

    def refuses_base(self, kind: str, about: str | None) -> str:
        return self.refuses("opened()", kind, about)


@pytest.fixture
def device(
    tab: NodeTab, bundle: Path, exported: ExportedBase, source: Callable[..., AdapterSource], household: IdentityKey
) -> Device:
    """With a private adapter in its bundle, which it has not used yet."""
    add_adapter(bundle, exported.adapter_inputs, source("anna", seed=1, parent="a" * 64), key=household)
    return Device(tab, bundle)


def test_a_flipped_bit_in_any_file_of_the_base_is_refused(device: Device) -> None:
    damaged(device.bundle / "base", BASE_FILES, "manifest.json", device.refuses_base)


def test_a_flipped_bit_in_either_file_of_an_adapter_is_refused(device: Device) -> None:
    damaged(device.bundle / "adapters", ADAPTER_FILES, "anna.json", device.refuses_adapter)


def damaged(folder: Path, names: list[str], manifest: str, refused: Callable[[str, str | None], str]) -> None:
    """A file with another bit, of another length, and one that is missing."""
    for name in names:
        path, stated = folder / name, "envelope" if name == manifest else name
        sound = path.read_bytes()
        for where in (0, 0.5, 1):
            flip(path, where)
            assert f"{folder.name}/{name}" in refused("TrustError", None if name == manifest else name)
            path.write_bytes(sound)
        for changed in (sound[:-1], sound + b"\0", b""):
            path.write_bytes(changed)
            refused("TrustError", stated)
        path.unlink()
        refused("DataError", name)
        path.write_bytes(sound)


def test_an_oversized_document_is_not_read_to_its_end(device: Device) -> None:
    (device.bundle / "adapters" / "anna.json").write_bytes(bytes(dsse.MAX_ENVELOPE + 1))
    assert "larger than its limit" in device.refuses_adapter("TrustError", "anna.json")


def test_a_name_that_leaves_the_folder_is_refused(device: Device) -> None:
    for name in ("../global", "/etc/passwd", "a/b", "%2e%2e"):
        device.refuses_adapter("ConfigError", "name", name)


def test_an_older_version_or_another_content_is_refused_even_after_the_page_was_closed(
    page: Any,
    serve: Callable[[Path], str],
    bundle: Path,
    exported: ExportedBase,
    source: Callable[..., AdapterSource],
    vendor: IdentityKey,
) -> None:
    """Versions are noted for each set of pinned keys."""
    url = serve(bundle)

    def opened(adapter: AdapterSource) -> str:
        write_bundle(bundle, exported, [adapter], key=vendor)
        page.goto(url)
        return str(page.alert("adapter-error"))

    assert opened(source(version=5)) == ""
    assert "is version 4, but version 5 was accepted here before" in opened(source(version=4))
    for other in (source(seed=5, version=5), replace(source(version=5), temperature=2.0)):
        assert "has another content than the version 5 that was accepted here before" in opened(other)
    assert opened(source(version=5)) == ""
    (bundle.parent / "trust.pem").write_bytes(vendor.public.to_pem())
    assert opened(source(version=4)) == ""
