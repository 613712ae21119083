"""A deployment of a language model: the commands of an operator, native devices, and tabs of Chromium."""

import json
from pathlib import Path
from typing import Any

import pytest

from aggregation.pki.identity import IdentityKey
from client.inference.generate import Generator, SamplingParams
from export.bundle.write import write_bundle
from export.causal import export_causal
from export.onnx.exported import Profile
from tests.integration.test_coordinator_up import LONG, coordinator_of, going_up
from tests.integration.test_language_federation import command, fleet_of_authors, train_with_bundle
from tests.support import cdp
from tests.support.gateway import HOST, attending, free_port, wait_until
from tests.support.tabs import AWAY, OUTCOMES, STATE, Tab, served
from tests.support.trial import call

pytestmark = pytest.mark.slow

ROUNDS = 2
WRITTEN = """(async (prompt) => {
  const { Client } = await import("/client.js");
  const client = new Client();
  await client.open();
  await client.use("global");
  let text = "";
  await client.generate({ prompt, maxTokens: 12 }, (piece) => (text += piece.text));
  return text;
})"""


@pytest.fixture
def bundle(tmp_path: Path, llama: Any, vendor: IdentityKey) -> Path:
    """A bundle without an adapter, of a language model that can be trained."""
    exported = export_causal(llama, ("q_proj", "v_proj"), Profile.FP32, training=True)
    write_bundle(tmp_path / "bundle", exported, [], key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    return tmp_path / "bundle"


def test_two_tabs_train_a_language_model_with_native_devices_and_use_what_is_published(
    tmp_path: Path, bundle: Path, llama: Any, one_thread: None, libraries: None, tabs: list[cdp.Page], capsys: Any
) -> None:
    """The coordinator is ``edgeadapt coordinator up``. One native device trains with torch, the other one with the
    bundle's training graph, as the tabs do.
    """
    fleet = fleet_of_authors(tmp_path / "fleet", llama, {"rank": 4})
    port = free_port()
    fleet.configure({"rounds": ROUNDS, "gateway.websocket": f"{HOST}:{port}", "aggregation.minimum_devices": 4})
    folder, light = coordinator_of(fleet)
    native, names = sorted(fleet.nodes.values())[:2], tuple(sorted(Path(each).name for each in fleet.nodes.values()))
    train_with_bundle(Path(native[1]), bundle)
    with served(bundle, gateway=f"ws://{HOST}:{port}") as url:
        devices = [Tab(page, name, tmp_path / name, url) for page, name in zip(tabs, names[2:], strict=True)]
        with going_up(folder) as up:
            wait_until(lambda: up.count("ready") or up.process.poll() is not None, LONG)
            with attending(light, native):
                for device in devices:
                    device.enrol(fleet)
                    device.take_part(fleet.state_dir(device.name).examples)
                assert up.wait() == 0, up.other
        records = fleet.registry().rounds()
        assert [(each.version, each.survivors, each.dropped) for each in records] == [(1, names, {}), (2, names, {})]
        for device in devices:
            device.page.until(f"{STATE} === {AWAY!r}")
            assert device.page.evaluate(OUTCOMES) == ["counted"] * ROUNDS
        capsys.readouterr()
        call("audit", "verify", folder, "--authority", fleet.out / "authority" / "authority.pem", "--json")
        assert json.loads(capsys.readouterr().out)["ok"]
        key = tmp_path / "publisher.pem"
        command("export", "key", str(key))
        command(
            "export",
            "adapter",
            "--registry",
            str(folder),
            "--format",
            "fp32",
            "--bundle",
            str(bundle),
            "--key",
            str(key),
        )
        with (tmp_path / "trust.pem").open("ab") as pins:
            pins.write((tmp_path / "publisher.pub.pem").read_bytes())
        page = devices[0].page
        page.goto(url)
        generator = Generator.open(bundle, tmp_path / "trust.pem", threads=1)
        expected = "".join(generator.complete("abab", SamplingParams(max_tokens=12), "global"))
        assert page.evaluate(f"{WRITTEN}('abab')") == expected
        assert expected != "".join(generator.complete("abab", SamplingParams(max_tokens=12), None))
        assert page.errors() == []
