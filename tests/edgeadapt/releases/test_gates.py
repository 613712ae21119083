"""The gates of a promotion, on real bundles in ONNX Runtime: what passes, what is refused, and what is in the log."""

import json
import operator
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, EdgeAdaptError, TrustError
from aggregation.pki.identity import IdentityKey
from client.inference.session import ClassificationSession
from edgeadapt.bases.base import Base
from edgeadapt.formats import files
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.policy import Outcome, Policy
from edgeadapt.formats.release import Rollout
from edgeadapt.program import cli
from edgeadapt.promotion.gates import AssembledRelease, GateError, GateSettings, read_held_out
from edgeadapt.releases.actions import ActionRecord, GateResult
from edgeadapt.releases.history import audit_repository
from edgeadapt.releases.repository import ChannelRepository
from edgeadapt.releases.rollback import roll_back
from export.bundle.write import AdapterSource, add_adapter
from tests.edgeadapt.releases.conftest import Vendor
from tests.support import models, refused
from tests.support.bundles import flip
from tests.support.models import PHRASES
from tests.support.otlp import attributes, receiving

LANGUAGES = ("en", "de")
WORDS = ("kitchen", "light", "door", "music", "timer", "open")


def phrases() -> list[str]:
    return [f"{phrase} {word}" for phrase in PHRASES for word in WORDS]


@dataclass
class Place:
    """A repository whose canary has version 1, with gates that it passes."""

    vendor: Vendor
    tmp: Path

    @property
    def folder(self) -> Path:
        return self.vendor.repository.folder

    def answers(self, number: int) -> list[str]:
        """What version ``number`` answers to the phrases, through ONNX Runtime."""
        repository = self.vendor.repository
        releases = [each for each in repository.releases("canary") if each.adapters["global"] == number + 1]
        trust = self.folder / "trust.pem"
        with tempfile.TemporaryDirectory(dir=self.tmp) as work:
            made = AssembledRelease.of(repository, "canary", releases[-1], trust, Path(work) / "release")
            found = made.answers("global", phrases())
        return [answer or "" for answer in found]

    def held_out(self, labels: list[str]) -> None:
        rows = [
            f"{label}\t{text}\t{LANGUAGES[n % 2]}"
            for n, (label, text) in enumerate(zip(labels, phrases(), strict=True))
        ]
        (self.folder / "held-out.tsv").write_text("\n".join(rows))

    def settings(self, *overrides: str, gates: str = '["size", "accuracy", "language", "canaries"]') -> None:
        (self.folder / "gates.toml").unlink(missing_ok=True)
        words = [f"gates={gates}", "accuracy.fewest=40", *overrides]
        words += ["accuracy.held_out=held-out.tsv", "canaries.phrases=canaries.tsv"]
        called("init", self.folder, *(part for word in words for part in ("--set", word)))

    def promote(self) -> Any:
        return json.loads(called("promote", self.folder, "canary", "stable", "--json"))

    def refused(self) -> ActionRecord:
        """A promotion that is refused; its record, the last of a log that the audit accepts."""
        before = self.vendor.repository.release("stable")
        with pytest.raises(GateError):
            self.promote()
        assert self.vendor.repository.release("stable") == before
        assert not list(self.folder.glob(".promotion-*"))
        record = audit_repository(self.folder, None).records[-1]
        assert record.action.kind == "refuse"
        return record


def called(*words: object) -> str:
    done = CliRunner().invoke(cli, ["release", *map(str, words)])
    if isinstance(done.exception, EdgeAdaptError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def names(record: ActionRecord) -> list[str]:
    return [each.gate for each in record.action.gates if not each.passed]


@pytest.fixture
def place(vendor_place: Vendor, tmp_path: Path) -> Place:
    made = Place(vendor_place, tmp_path)
    (made.folder / "trust.pem").write_bytes(vendor_place.key.public.to_pem())
    vendor_place.publish(1)
    answers = made.answers(1)
    made.held_out(answers)
    (made.folder / "canaries.tsv").write_text(f"{answers[0]}\t{phrases()[0]}\n{answers[9]}\t{phrases()[9]}\n")
    made.settings()
    return made


def test_a_release_that_passes_is_promoted_and_its_figures_are_in_the_log(place: Place) -> None:
    made = place.promote()
    assert (made["channel"], made["release"]) == ("stable", 1)
    record = audit_repository(place.folder, None).records[-1]
    assert (record.action.kind, record.action.source, record.action.subject) == ("promote", "canary", "stable")
    figures = {each.gate: each.measured for each in record.action.gates}
    assert figures == {
        "size of global": figures["size of global"],
        "size of the release": figures["size of the release"],
        "accuracy of global": 1.0,
        "language de of global": 1.0,
        "language en of global": 1.0,
        "canaries of global": 1.0,
    }
    adapter = place.vendor.repository.release("stable")
    assert adapter is not None
    assert figures["size of global"] == (place.vendor.bundle / "adapters" / "global.onnx_adapter").stat().st_size
    shown = CliRunner().invoke(cli, ["audit", "show", str(place.folder)]).output
    assert "passed  accuracy of global: 1.0000" in shown


def test_a_release_that_is_worse_than_the_current_one_is_refused_by_name(place: Place) -> None:
    place.promote()
    place.vendor.publish(2)
    record = place.refused()
    assert "accuracy of global" in names(record)
    found = next(each for each in record.action.gates if each.gate == "accuracy of global")
    right = sum(a == b for a, b in zip(place.answers(1), place.answers(2), strict=True))
    assert found.measured == pytest.approx(right / len(phrases()))
    assert found.limit == pytest.approx(1 - 0.01)
    assert (record.action.release, record.action.adapters) == (2, {"global": 3})


def test_a_promotion_to_a_share_of_devices_passes_the_same_gates(place: Place) -> None:
    place.promote()
    place.vendor.publish(2)
    words = ("promote", place.folder, "canary", "stable", "--share", 10, "--language", "de")
    with pytest.raises(GateError):
        called(*words)
    assert place.vendor.repository.rollout("stable") is None
    place.settings(gates='["size"]')
    assert "for 10 % of devices with language de; release 1 for the others" in called(*words)
    found = json.loads(called("rollout", place.folder, "stable", "--share", 20, "--json"))
    assert found["rollout"] == {"release": 2, "previous": 1, "share": 20, "languages": []}
    stages = [record.action.rollout for record in audit_repository(place.folder, None).records[-3:]]
    assert stages == [None, Rollout(2, 1, 10, ("de",)), Rollout(2, 1, 20)]
    done = CliRunner().invoke(cli, ["release", "rollout", str(place.folder), "stable", "--share", "101"])
    assert (done.exit_code, "--share" in done.output) == (2, True)


def test_the_margin_decides(place: Place) -> None:
    place.promote()
    place.vendor.publish(2)
    old, new = place.answers(1), place.answers(2)
    place.held_out([b if n % 3 == 0 else a for n, (a, b) in enumerate(zip(old, new, strict=True))])
    loss = sum(a != b for n, (a, b) in enumerate(zip(old, new, strict=True)) if n % 3) / len(old)
    loss -= sum(a != b for n, (a, b) in enumerate(zip(old, new, strict=True)) if n % 3 == 0) / len(old)
    assert 0.05 < loss < 0.95
    place.settings("accuracy.least=0", f"accuracy.margin={loss - 0.001}", gates='["accuracy"]')
    place.refused()
    place.settings("accuracy.least=0", f"accuracy.margin={loss + 0.001}", gates='["accuracy"]')
    assert place.promote()["release"] == 2


@pytest.mark.parametrize("gates", ['["size", "parity", "accuracy"]', '["size", "parity"]'], ids=["with", "without"])
def test_a_first_release_whose_labels_are_swapped_passes_parity_and_not_the_accuracy_by_default(
    place: Place, tiny_base: Base, gates: str
) -> None:
    (place.folder / "texts.txt").write_text("\n".join(phrases()[:12]))
    words = [f"parity.state={place.vendor.state_dir}", f"parity.base={tiny_base.folder}", "parity.texts=texts.txt"]
    place.settings(*words, gates=gates)
    place.vendor.publish(1, version=3, labels=(*models.LABELS[1:], models.LABELS[0]))
    if "accuracy" in gates:
        assert names(place.refused()) == ["accuracy of global"]
    else:
        assert place.promote()["channel"] == "stable"


def test_a_canary_phrase_with_another_answer_refuses(place: Place) -> None:
    lines = (place.folder / "canaries.tsv").read_text().splitlines()
    label = next(each for each in ("Light", "Lock") if not lines[1].startswith(each))
    (place.folder / "canaries.tsv").write_text(f"{lines[0]}\n{label}\t{lines[1].partition(chr(9))[2]}\n")
    record = place.refused()
    assert names(record) == ["canaries of global"]
    assert "phrase 2 is" in record.action.gates[-1].text


def test_one_language_that_is_poor_refuses_although_the_mean_is_good(place: Place) -> None:
    answers = place.answers(1)
    other = {label: next(each for each in ("Light", "Lock") if each != label) for label in set(answers)}
    wrong = iter([1] * 14)
    labels = [other[label] if n % 2 and next(wrong, 0) else label for n, label in enumerate(answers)]
    place.held_out(labels)
    place.settings("accuracy.least=0.6")
    record = place.refused()
    assert names(record) == ["language de of global"]
    assert {each.gate for each in record.action.gates if each.passed} >= {"accuracy of global", "language en of global"}


def test_a_release_that_is_too_large_refuses(place: Place) -> None:
    place.settings("size.adapter=100", "size.release=200")
    assert names(place.refused()) == ["size of global", "size of the release"]


def test_parity_with_torch_is_measured_and_other_tensors_refuse(place: Place, tiny_base: Base) -> None:
    (place.folder / "texts.txt").write_text("\n".join(phrases()[:12]))
    words = [f"parity.state={place.vendor.state_dir}", f"parity.base={tiny_base.folder}", "parity.texts=texts.txt"]
    place.settings(*words, gates='["parity"]')
    (found,) = place.promote()["gates"]
    assert found["gate"] == "parity of global"
    assert 0 <= found["measured"] < found["limit"]
    place.vendor.publish(2, really=0)  # the file of another version, under the name of version 2
    record = place.refused()
    assert names(record) == ["parity of global"]
    worse = record.action.gates[0].measured
    assert worse is not None
    assert worse > 0.01


def test_parity_without_torch_is_a_refusal(place: Place, tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.folder / "texts.txt").write_text("\n".join(phrases()[:2]))
    words = [f"parity.state={place.vendor.state_dir}", f"parity.base={tiny_base.folder}", "parity.texts=texts.txt"]
    place.settings(*words, gates='["parity"]')
    monkeypatch.setitem(sys.modules, "export.parity.compare", None)
    assert "not installed" in place.refused().action.gates[0].text


@pytest.mark.parametrize(
    ("file", "content", "gates"),
    [
        ("held-out.tsv", None, ["accuracy", "language"]),
        ("held-out.tsv", "", ["accuracy", "language"]),
        ("held-out.tsv", "Light\tturn on\n" * 60, ["accuracy", "language"]),
        ("held-out.tsv", "Ligth\tturn on\ten\n" * 60, ["accuracy", "language"]),
        ("held-out.tsv", b"\xff\xfe", ["accuracy", "language"]),
        ("held-out.tsv", "Light\tturn on the light\ten\n" * 5, ["accuracy", "language en of global"]),
        ("canaries.tsv", None, ["canaries"]),
        ("canaries.tsv", "no tab", ["canaries"]),
    ],
    ids=["missing", "empty", "no language", "misspelled label", "not text", "too few", "no canaries", "no label"],
)
def test_what_cannot_be_measured_is_a_refusal(
    place: Place, file: str, content: str | bytes | None, gates: list[str]
) -> None:
    path = place.folder / file
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    record = place.refused()
    assert names(record) == gates
    for each in record.action.gates:
        assert each.passed or (each.measured is None and "cannot be measured" in each.text)


def test_gates_that_name_no_file_refuse(place: Place) -> None:
    (place.folder / "gates.toml").unlink()
    called("init", place.folder)  # the defaults
    assert names(place.refused()) == ["parity", "accuracy", "language", "canaries"]


def test_a_bundle_that_the_vendor_did_not_sign_refuses(place: Place) -> None:
    stranger = IdentityKey.generate(SystemEntropy()).public
    (place.folder / "trust.pem").write_bytes(stranger.to_pem())
    assert names(place.refused()) == ["size", "accuracy", "language", "canaries"]


def test_a_file_of_the_release_that_was_altered_refuses(place: Place) -> None:
    (path,) = (place.folder / "public/targets/canary/adapters").glob("*.global.onnx_adapter")
    flip(path, 0.5)
    assert names(place.refused()) == ["accuracy", "language", "canaries"]


def test_a_release_that_changed_while_it_was_measured_is_not_promoted(place: Place) -> None:
    place.vendor.publish(2)
    with refused(ConfigError, "channel"):
        place.vendor.repository.promote("canary", 1, "stable", ())


def test_a_publication_to_stable_is_refused_and_names_the_promotion(place: Place) -> None:
    place.promote()
    vendor = place.vendor
    words = ("release", "publish", place.folder, "stable", "--bundle", vendor.bundle, "--trust")
    done = CliRunner().invoke(cli, [*map(str, words), str(place.folder / "trust.pem")])
    assert isinstance(done.exception, ConfigError)
    assert f"edgeadapt release promote {place.folder} FROM stable" in str(done.exception)
    assert "\n" not in str(done.exception)
    assert [len(vendor.repository.releases(name)) for name in ("canary", "stable")] == [1, 1]


@pytest.mark.parametrize("measured", [(), (GateResult("size", False, 2.0, 1.0, "2 bytes"),)])
def test_a_protected_channel_takes_no_release_that_passed_no_gates(
    place: Place, measured: tuple[GateResult, ...]
) -> None:
    with refused(ConfigError, "gates"):
        place.vendor.repository.promote("canary", 1, "stable", measured)
    assert place.vendor.repository.release("stable") is None


@pytest.mark.parametrize("kind", ["publish", "promote"])
def test_an_audit_finds_a_release_of_a_protected_channel_that_passed_no_gates(place: Place, kind: str) -> None:
    """Who has the keys of the channel and the snapshot, and a program that asks nothing."""
    bypassed = ChannelRepository.protected
    try:
        ChannelRepository.protected = frozenset()  # type: ignore[assignment,method-assign]
        if kind == "publish":
            place.vendor.publish(2, "stable")
        else:
            place.vendor.repository.promote("canary", 1, "stable", ())
    finally:
        ChannelRepository.protected = bypassed  # type: ignore[method-assign]
    with refused(TrustError, "stable"):
        audit_repository(place.folder, None)


def test_an_audit_names_a_release_from_before_the_protection(place: Place) -> None:
    repository = place.vendor.repository
    repository.protect("canary")
    assert audit_repository(place.folder, None).unpromoted == {"canary": 1}
    said = CliRunner().invoke(cli, ["audit", "verify", str(place.folder)]).output
    assert "channel canary is protected, and its release 1 was published before that" in said
    repository.protect("canary", on=False)
    place.promote()
    assert audit_repository(place.folder, None).unpromoted == {}


def test_a_promotion_that_lacks_something_names_it(place: Place) -> None:
    with refused(ConfigError, "channel"):
        called("promote", place.folder, "stable", "canary")  # stable has no release
    with refused(ConfigError, "gates.toml"):
        called("init", place.folder)  # it is there already
    place.promote()
    with refused(ConfigError, "channel"):
        called("promote", place.folder, "stable", "stable")
    (path,) = (place.folder / "public/targets/canary/adapters").glob("*.global.onnx_adapter")
    path.unlink()
    with refused(DataError, path.name):
        place.promote()
    for name in ("trust.pem", "gates.toml"):
        (place.folder / name).unlink()
        with refused(ConfigError, name):
            place.promote()


@pytest.mark.parametrize(
    ("table", "about"),
    [
        ({"acuracy": {}}, "acuracy"),
        ({"accuracy": {"margn": 0.1}}, "accuracy.margn"),
        ({"accuracy": {"margin": -0.1}}, "accuracy.margin"),
        ({"gates": []}, "gates"),
        ({"gates": ["size", "taste"]}, "gates.1"),
        ({"gates": ["size", "size"]}, ""),
    ],
)
def test_settings_that_are_refused(table: dict[str, Any], about: str) -> None:
    with refused(ConfigError, about):
        GateSettings.parse(table, "gates.toml")


def test_a_rollback_through_the_command_and_one_that_devices_would_refuse(place: Place, tmp_path: Path) -> None:
    place.promote()
    place.vendor.publish(2)
    place.settings("accuracy.margin=1", "language.least=0", gates='["size"]')
    place.promote()
    key, stranger = tmp_path / "vendor.key", IdentityKey.generate(SystemEntropy())
    for signer in (stranger, place.vendor.key):
        key.write_bytes(signer.to_pem())
        key.chmod(0o600)
        words = ("rollback", place.folder, "stable", "--to", 1, "--key", key)
        if signer is stranger:
            with refused(TrustError, "--key"):
                called(*words)
        else:
            assert "stable, release 3: global 4" in called(*words)
    action = audit_repository(place.folder, None).records[-1].action
    assert (action.kind, action.release, action.again) == ("rollback", 3, 1)


def test_held_out_phrases_are_read_by_line(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("Light\tturn on\ten\nLight\tmach an\n")
    with refused(DataError, "x.tsv") as error:
        read_held_out(tmp_path / "x.tsv")
    assert "turn on" not in str(error.value)


def test_a_promotion_is_a_trace_with_a_span_for_each_gate(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        place.promote()
    promotion, *parts = receiver.spans()
    assert promotion.name == "promotion"
    assert attributes(promotion)["edgeadapt.channel"] == "stable"
    assert {span.parent_span_id for span in parts} == {promotion.span_id}
    gates = [attributes(span) for span in parts if span.name == "gate"]
    assert [(each["edgeadapt.gate"], each["edgeadapt.passed"]) for each in gates] == [
        ("size", True),
        ("accuracy", True),
        ("language", True),
        ("canaries", True),
    ]
    assert [span.name for span in parts if span.name != "gate"] == ["publish"]


# The policy of a release


def govern(place: Place, version: int, **policy: Any) -> None:
    """Publish version 1 again, under a policy."""
    vendor = place.vendor
    values, origin = vendor.values[1], files.sha256(files.encode(vendor.values[1]))
    config, policed = PeftConfig.lora(rank=4, alpha=8), Policy(**policy)
    source = AdapterSource("global", values, models.LABELS, version, origin, peft_config=config, policy=policed)
    add_adapter(vendor.bundle, vendor.exported.adapter_inputs, source, key=vendor.key, form="fp32")
    vendor.repository.publish("canary", vendor.bundle, [vendor.key.public])


def test_a_policy_is_held_to_the_held_out_phrases(place: Place) -> None:
    place.settings(gates='["size", "policy"]')
    assert place.promote()["release"] == 1  # there is none yet
    answers = place.answers(1)
    label = max(answers, key=answers.count)
    govern(place, 3, deny=(label,))
    place.promote()
    results = audit_repository(place.folder, None).records[-1].action.gates
    assert {each.text: each.measured for each in results if each.gate == "policy of global"} == {
        f"0 of {answers.count(label)} phrases of denied labels are answered, at most 0.0%": 0.0,
        f"0 of {len(answers) - answers.count(label)} phrases of other labels are withheld, at most 10.0%": 0.0,
    }
    other = next(one for one in models.LABELS if one != answers[0])
    place.held_out([other, *answers[1:]])
    govern(place, 4, deny=(other,))  # a phrase of the denied label gets another answer
    assert names(place.refused()) == ["policy of global"]
    place.held_out(answers)
    govern(place, 5, least=1.0)
    assert names(place.refused()) == ["policy of global"]
    place.settings("policy.withheld=1", gates='["size", "policy"]')
    place.promote()


# Adapters that answer as one


FILES = '{global = "held-out.tsv", lamps = "lamps.tsv"}'


def two(place: Place, number: int, version: int, policy: Policy | None = None) -> None:
    """Publish version 1 as global, and version ``number`` as lamps."""
    vendor, config = place.vendor, PeftConfig.lora(rank=4, alpha=8)
    digests = [files.sha256(files.encode(values)) for values in vendor.values]
    for name, which in (("global", 1), ("lamps", number)):
        source = AdapterSource(
            name, vendor.values[which], models.LABELS, version, digests[which], peft_config=config, policy=policy
        )
        add_adapter(vendor.bundle, vendor.exported.adapter_inputs, source, key=vendor.key, form="fp32")
    vendor.repository.publish("canary", vendor.bundle, [vendor.key.public])


def test_adapters_that_spoil_each_others_answers_are_refused_by_more_than_the_margin(
    place: Place, tmp_path: Path
) -> None:
    two(place, 2, 3)
    release = place.vendor.repository.release("canary")
    assert release is not None
    trust = place.folder / "trust.pem"
    made = AssembledRelease.of(place.vendor.repository, "canary", release, trust, tmp_path / "both")
    kept, losses = {}, []
    for name, joined, file in (("lamps", "global", "lamps.tsv"), ("global", "lamps", "held-out.tsv")):
        alone, both = (made.answers(answering, phrases()) for answering in (name, f"{name}+{joined}:0.75"))
        labels = [(both if n % 4 == 0 else alone)[n] or "" for n in range(len(both))]
        place.held_out(labels)
        (place.folder / "held-out.tsv").rename(place.folder / file)
        before, after = (sum(map(operator.eq, given, labels)) / len(labels) for given in (alone, both))
        kept[f"interference of {joined} with {name}"] = after
        losses.append(before - after)
    loss = max(losses)
    assert 0.1 < loss < 0.9
    words = (f"interference.held_out={FILES}", "interference.fewest=40", "interference.weights=[1.0, 0.75]")
    gates = '["interference"]'
    place.settings(*words, f"interference.margin={loss - 0.001}", gates=gates)
    assert {each.gate: each.measured for each in place.refused().action.gates} == pytest.approx(kept)
    place.settings(*words, f"interference.margin={loss + 0.001}", gates=gates)
    place.promote()
    place.settings(*words, "interference.fewest=1000", gates=gates)
    assert names(place.refused()) == ["interference"]


def test_an_adapter_with_itself_in_equal_shares_answers_as_alone(place: Place) -> None:
    two(place, 1, 3)
    shutil.copyfile(place.folder / "held-out.tsv", place.folder / "lamps.tsv")
    words = (f"interference.held_out={FILES}", "interference.fewest=40", "interference.margin=0")
    place.settings(*words, "interference.weights=[0.5, 0.5]", gates='["interference"]')
    place.promote()
    results = audit_repository(place.folder, None).records[-1].action.gates
    assert [each.measured for each in results] == [1.0, 1.0]


def test_the_policy_says_which_adapters_are_measured_together(place: Place) -> None:
    place.settings("interference.fewest=1", gates='["interference"]')
    two(place, 2, 3, Policy(combine=(("global", "*"), ("lamps",))))
    place.promote()
    (result,) = audit_repository(place.folder, None).records[-1].action.gates
    assert (result.gate, result.measured) == ("interference", 0)
    two(place, 2, 5, Policy(combine=(("global", "lamps"),)))
    (result,) = place.refused().action.gates
    assert "interference.held_out.global" in result.text


@pytest.mark.parametrize(
    "words",
    [
        (),
        ('interference.held_out={global = "held-out.tsv"}',),
        ('interference.held_out={global = "held-out.tsv", lamp = "held-out.tsv"}',),
        ('interference.held_out={global = "held-out.tsv", lamps = "nowhere.tsv"}',),
        ('interference.held_out={global = "held-out.tsv", lamps = "canaries.tsv"}',),
        ('interference.held_out={global = "held-out.tsv", lamps = "held-out.tsv"}', "interference.weights=[1.0, 17.0]"),
    ],
    ids=["no file", "one file", "misspelled", "missing", "another form", "no weight"],
)
def test_interference_that_cannot_be_measured_refuses(place: Place, words: tuple[str, ...]) -> None:
    two(place, 1, 3)
    place.settings("interference.fewest=40", "interference.margin=1", *words, gates='["interference"]')
    result = place.refused().action.gates[-1]
    assert (result.measured, result.passed) == (None, False)


def test_interference_is_measured_only_where_gates_names_it() -> None:
    assert GateSettings().gates == ("size", "parity", "accuracy", "language", "canaries", "policy")


def test_a_rollback_to_another_policy_opens_on_a_device_that_had_the_newer_one(place: Place, tmp_path: Path) -> None:
    label = place.answers(1)[0]
    govern(place, 3, deny=(label,))
    repository, trust = place.vendor.repository, place.folder / "trust.pem"
    roll_back(repository, "canary", 1, place.vendor.key)
    device = tmp_path / "device"
    device.mkdir()
    shutil.copyfile(trust, device / "trust.pem")
    given = []
    for number in (2, 3):
        release = repository.release("canary", number)
        assert release is not None
        shutil.rmtree(device / "bundle", ignore_errors=True)
        repository.assemble("canary", release, device / "bundle")
        given.append(ClassificationSession.open(device / "bundle").ranking(phrases()[0], "global", 1).outcome)
    assert given == [Outcome.BLOCKED, Outcome.ANSWERED]
