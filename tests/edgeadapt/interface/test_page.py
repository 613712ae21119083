"""The examples of the page on Python, on tiny bundles."""

import re
import runpy
import threading
from pathlib import Path
from typing import Any

import pytest

import edgeadapt
from aggregation.pki.identity import IdentityKey
from edgeadapt.bases.base import Base
from edgeadapt.formats.keyfiles import TLS_CERTIFICATE, TLS_KEY
from edgeadapt.formats.peftconfig import PeftConfig
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.exported import ExportedBase
from tests.support import FleetOf, refused
from tests.support.gateway import HOST, authority_of, certify, free_port
from tests.support.models import draw

PAGE = (Path(__file__).parents[3] / "docs/reference/python.md").read_text()
BLOCKS = dict(re.findall(r"^## ([^\n]+)\n\n```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
LABELS = ("HassTurnOn", "HassTurnOff", "HassStartTimer", "HassGetState")


def run(program: str) -> dict[str, Any]:
    """The names of a program that ran in the working directory."""
    Path("example.py").write_text(f"import edgeadapt\n{program}")
    return runpy.run_path("example.py")


def test_it_has_an_example_of_the_whole_interface() -> None:
    named = set(re.findall(r"`(\w+)", PAGE.partition("## Use a bundle")[0]))
    used = set(re.findall(r"edgeadapt\.(\w+)", "".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.DOTALL))))
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
    adapter = AdapterSource("global", values, LABELS, 3, "c" * 64, None, PeftConfig.lora(rank=4, alpha=8))
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
    assert names["model"].labels == LABELS
    assert edgeadapt.load("shop/bundle").adapters == ["global"]
    again = edgeadapt.export(model, labels=LABELS, bundle=Path("shop/bundle"), key=Path("vendor.pem"), adapter="other")
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
