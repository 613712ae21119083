"""Someone who can write to a device's bundle, and has files of other releases, takes away what forbids an answer.

The signatures of all files are genuine. The base manifest names the policy, and so does each shared adapter, whose
version a device accepts in one direction only.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from aggregation.errors import DataError, EdgeAdaptError, TrustError
from aggregation.pki.identity import IdentityKey
from client.inference.session import ClassificationSession
from edgeadapt.formats.bundle import ADAPTERS, BASE, BASE_MANIFEST, POLICY, Bundle
from edgeadapt.formats.policy import Outcome, Policy
from export.bundle.write import AdapterSource, add_adapter
from export.onnx.exported import ExportedBase
from tests.support import models, refused
from tests.support.models import Source

globals().update(models.FIXTURES)
TEXT = "turn on the light"
Tamper = Callable[[Path, Path, Path], object]  # bundle, the release before its policy, one with another policy


def answer(bundle: Path, name: str = "global") -> str | None:
    found = ClassificationSession.open(bundle).ranking(TEXT, name, 1)
    assert (found.outcome is Outcome.BLOCKED) == (not found.predictions)
    return found.predictions[0].label if found.predictions else None


@pytest.fixture
def releases(
    bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey, household: IdentityKey
) -> tuple[Path, Path, Path]:
    """The bundle in use, which denies the label, with a private adapter; the release before; one that denies none."""

    def copied(name: str) -> Path:
        return shutil.copytree(bundle, bundle.parent / name / "bundle")

    def release(given: AdapterSource, policy: Policy) -> None:
        add_adapter(bundle, exported.adapter_inputs, replace(given, policy=policy), key=vendor)

    label = answer(bundle)
    assert label
    (bundle.parent / "trust.seen.json").unlink()
    add_adapter(bundle, exported.adapter_inputs, source("anna", seed=0, parent="a" * 64), key=household)
    before = copied("before")
    release(source(version=4), Policy())
    lenient = copied("lenient")
    release(source(version=5), Policy(deny=(label,)))
    return bundle, before, lenient


def swap(bundle: Path, other: Path, *names: Path) -> None:
    for name in names:
        (bundle / name).unlink(missing_ok=True)
        if (other / name).exists():
            shutil.copyfile(other / name, bundle / name)


RULES, FILES = BASE / POLICY, (BASE / POLICY, BASE_MANIFEST)
SHARED = [ADAPTERS / "global.json", ADAPTERS / "global.onnx_adapter"]
ATTACKS: dict[str, tuple[Tamper, type[EdgeAdaptError], str]] = {
    "removed": (lambda bundle, *_: (bundle / RULES).unlink(), DataError, POLICY),
    "edited": (lambda bundle, *_: (bundle / RULES).write_bytes(Policy().encode()), TrustError, POLICY),
    "of another release": (lambda bundle, _, lenient: swap(bundle, lenient, RULES), TrustError, POLICY),
    "removed with the manifest that names it": (
        lambda bundle, before, _: swap(bundle, before, *FILES),
        TrustError,
        "adapter-manifest.policy",
    ),
    "of another release, with the manifest that names it": (
        lambda bundle, _, lenient: swap(bundle, lenient, *FILES),
        TrustError,
        "adapter-manifest.policy",
    ),
}


@pytest.mark.parametrize("name", ["global", "anna"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_bundle_does_not_answer_without_its_own_policy(
    releases: tuple[Path, Path, Path], attack: str, name: str
) -> None:
    assert answer(releases[0], name) is None
    (releases[0].parent / "trust.seen.json").unlink()  # also on a device that never saw the bundle
    tamper, error, about = ATTACKS[attack]
    tamper(*releases)
    with refused(error, about) as caught:
        answer(releases[0], name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["global", "anna"])
@pytest.mark.parametrize("older", [1, 2])
def test_a_device_does_not_go_back_to_a_whole_release_with_another_policy_or_none(
    releases: tuple[Path, Path, Path], older: int, name: str
) -> None:
    bundle = releases[0]
    assert answer(bundle) is None
    swap(bundle, releases[older], *FILES, *SHARED)
    with refused(TrustError, "adapter-manifest.version"):
        answer(bundle, name)


def test_a_private_adapter_does_not_answer_next_to_a_shared_one_that_is_damaged(
    releases: tuple[Path, Path, Path],
) -> None:
    bundle, _, lenient = releases
    swap(bundle, lenient, *FILES)
    (bundle / SHARED[0]).write_bytes(b"{}")
    with refused(TrustError, "envelope"):
        answer(bundle, "anna")


def test_without_the_check_the_denied_label_is_answered(
    releases: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer(releases[0]) is None
    monkeypatch.setattr(Bundle, "governing", lambda *_: [])
    ATTACKS["removed with the manifest that names it"][0](*releases)
    assert answer(releases[0]) is not None
    assert answer(releases[0], "anna") is not None
