"""A deployment of a language model: the commands of an operator, native devices, and tabs of Chromium."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from aggregation.pki.identity import IdentityKey
from client.inference.generate import Generator, SamplingParams
from client.training.engine import language_trainer
from client.training.examples import Split, in_split, read_examples
from client.training.trainer import LanguageTrainer
from export.bundle.write import write_bundle
from export.causal import export_causal
from export.onnx.exported import Profile
from simulations.engine import provision
from tests.conftest import TinyFleet
from tests.support import cdp
from tests.support.authors import AUTHORS, fleet_of_authors, train_with_bundle
from tests.support.gateway import HOST, attending, free_port, wait_until
from tests.support.tabs import AWAY, OUTCOMES, STATE, Tab, served
from tests.support.trial import call
from tests.support.up import LONG, coordinator_of, going_up

pytestmark = pytest.mark.slow

ROUNDS = 2
ROUNDING = 6e-3  # nats, of a loss as it is published
HELD_OUT = 26  # examples of each device: four devices have the hundred without which no loss is published
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
def bundle(tmp_path: Path, lm_base: Any, vendor: IdentityKey) -> Path:
    """A bundle without an adapter, of a language model that can be trained."""
    exported = export_causal(lm_base, ("q_proj", "v_proj"), Profile.FP32, training=True)
    write_bundle(tmp_path / "bundle", exported, [], key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    return tmp_path / "bundle"


def repeat_held_out(examples: Path) -> None:
    lines = examples.read_text().splitlines()
    held_out = [line for line in lines if Split.VALIDATION.value in line]
    more = [held_out[number % len(held_out)] for number in range(HELD_OUT - len(held_out))]
    examples.write_text("\n".join([*lines, *more]) + "\n")


def held_out_loss(fleet: TinyFleet, version: int) -> float:
    """The mean of all devices' held-out examples with a version of the adapter."""
    trainer = language_trainer(fleet.base, provision.peft_config(fleet.scenario, fleet.base))
    adapter = fleet.registry().tensors(version)
    examples = [read_examples(fleet.state_dir(name).examples, 0) for name in AUTHORS]
    held_out = [one for each in examples for one in in_split(each, Split.VALIDATION)]
    return trainer.score(adapter, held_out).loss / (HELD_OUT * len(AUTHORS))


def test_two_tabs_train_a_language_model_with_native_devices_and_use_what_is_published(
    tmp_path: Path,
    bundle: Path,
    lm_base: Any,
    one_thread: None,
    libraries: None,
    tabs: list[cdp.Page],
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The coordinator is ``edgeadapt coordinator up``. One native device trains with torch, the other one with the
    bundle's training graph, as the tabs do. A device that fails to train adds no loss, and of less
    than all four, none is published.
    """
    bases, train = list[Path](), LanguageTrainer.train

    def counted(self: LanguageTrainer, *rest: Any, **named: Any) -> Any:
        bases.append(self.base.folder)
        return train(self, *rest, **named)

    monkeypatch.setattr(LanguageTrainer, "train", counted)
    fleet = fleet_of_authors(tmp_path / "fleet", lm_base, {"rank": 4})
    port = free_port()
    fleet.configure({"rounds": ROUNDS, "gateway.websocket": f"{HOST}:{port}", "aggregation.minimum_devices": 4})
    fleet.configure({"aggregation.ring_bits": 32})  # a step of the loss's sum is then far below ROUNDING
    for name in AUTHORS:
        repeat_held_out(fleet.state_dir(name).examples)
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
        assert Counter(bases) == {fleet.base.folder: ROUNDS, bundle / "base": ROUNDS}
        for record in records:
            assert record.metrics["loss"] == pytest.approx(held_out_loss(fleet, record.version - 1), abs=ROUNDING)
        for device in devices:
            device.page.until(f"{STATE} === {AWAY!r}")
            assert device.page.evaluate(OUTCOMES) == ["counted"] * ROUNDS
        capsys.readouterr()
        call("audit", "verify", folder, "--authority", fleet.out / "authority" / "authority.pem", "--json")
        assert json.loads(capsys.readouterr().out)["ok"]
        key = tmp_path / "publisher.pem"
        call("bundle", "key", key)
        where = ("--registry", folder, "--bundle", bundle)
        call("bundle", "add", *where, "--format", "fp32", "--key", key)
        with (tmp_path / "trust.pem").open("ab") as pins:
            pins.write((tmp_path / "publisher.pub.pem").read_bytes())
        page = devices[0].page
        page.goto(url)
        generator = Generator.open(bundle, tmp_path / "trust.pem", threads=1)
        expected = "".join(generator.complete("abab", SamplingParams(max_tokens=12), "global"))
        assert page.evaluate(f"{WRITTEN}('abab')") == expected
        assert expected != "".join(generator.complete("abab", SamplingParams(max_tokens=12), None))
        assert page.errors() == []
