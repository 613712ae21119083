"""Asks a run's global adapter every test phrase of its clients: in torch, in ONNX Runtime and in Chromium.

    python -m tests.browser.accuracy runs/mine
    python -m tests.browser.accuracy --profile native-int8 --json runs/mine

The base is exported anew with the profile, by default that for browsers. Prints the share of right answers of each, and
by how many points the exported ones are off. A run prints this for the profile of its bundles, in ONNX Runtime only.
"""

import json
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError
from aggregation.pki.identity import IdentityKey
from client.browser.server import Site, http_server
from client.inference.session import ClassificationSession
from client.training.engine import classifier_trainer
from edgeadapt.formats.bundle import TRUST
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.classifier import export_classifier
from export.onnx.exported import Profile
from simulations.data import populate
from simulations.data.population import Population
from simulations.engine import provision
from simulations.engine.provision import training_base
from simulations.scenario import Scenario
from tests.support.cdp import Chromium, Page, installed

OPEN = """(async () => {
  const { Client } = await import('/client.js');
  window.client = new Client();
  await client.open();
  await client.use('global');
})()"""
ANSWER = """(async () => {
  const found = [];
  for (const phrase of %s) found.push((await client.rank(phrase, 1)).labels[0].label);
  return found;
})()"""
PROFILES = [profile.value for profile in Profile]
TOGETHER = 20  # phrases of one request to the browser, which is not waited for without end


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of right answers, 0 to 1, to ``count`` phrases."""

    profile: str
    count: int
    torch: float
    native: float
    browser: float

    def lines(self) -> str:
        rows = [f"torch      {self.torch:.4f} of {self.count} phrases"]
        for name, share in (("native", self.native), ("Chromium", self.browser)):
            rows.append(f"{name:<10} {share:.4f} in {self.profile}, {100 * (share - self.torch):+.2f} points")
        return "\n".join(rows)


@click.command()
@click.option("--profile", type=click.Choice(PROFILES), default=Profile.WEB_INT8.value, show_default=True)
@click.option("--json", "as_json", is_flag=True)
@click.argument("run", type=click.Path(path_type=Path, exists=True))
def main(run: Path, profile: str, as_json: bool) -> None:
    """Measure the run in the folder RUN, after its last round."""
    program = installed()
    if program is None:
        raise ConfigError("no chromium on the path: apt install chromium")
    found = measure(run.resolve(), Profile(profile), program)
    click.echo(json.dumps({name: getattr(found, name) for name in found.__slots__}) if as_json else found.lines())


def measure(run: Path, profile: Profile, program: str) -> Accuracy:
    """Export, and ask the three of them."""
    scenario = Scenario.parse(json.loads((run / "scenario.json").read_bytes()), "scenario.json")
    population = populate(scenario.data, scenario.population, scenario.seed).population
    base = training_base(run, scenario, population)
    trainer = classifier_trainer(base, len(population.labels), provision.peft_config(scenario, base))
    registry = provision.registry(run)
    version = registry.latest() or registry.version(0)
    tensors, manifest = registry.tensors(version.manifest.version), version.manifest
    texts, labels = _tests(population)
    source = AdapterSource(
        "global", tensors, population.labels, manifest.version, manifest.sha256, peft_config=manifest.peft_config
    )
    key = IdentityKey.generate(SystemEntropy())
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        write_bundle(bundle, export_classifier(trainer.engine.model, base, profile), [source], key=key)
        (bundle.parent / TRUST).write_bytes(key.public.to_pem())
        native = ClassificationSession.open(bundle).classify(texts, "global")
        browser = _in_chromium(program, bundle, texts)
    known = np.array(labels)
    return Accuracy(
        profile.value,
        len(texts),
        float((trainer.logits(tensors, texts).argmax(axis=1) == known).mean()),
        _share([answer.label for answer in native], labels, population),
        _share(browser, labels, population),
    )


def _tests(population: Population) -> tuple[list[str], list[int]]:
    tests = [example for client in population.clients for example in client.test]
    return [example.text for example in tests], [example.label for example in tests]


def _share(answers: Sequence[str], labels: Sequence[int], population: Population) -> float:
    right = [answer == population.labels[label] for answer, label in zip(answers, labels, strict=True)]
    return sum(right) / len(right)


def _in_chromium(program: str, bundle: Path, texts: Sequence[str]) -> list[str]:
    with http_server(Site.of(bundle), "127.0.0.1", 0) as serving, tempfile.TemporaryDirectory() as profile:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        browser = Chromium(program, Path(profile))
        try:
            page = Page(browser)
            page.goto(f"http://127.0.0.1:{serving.server_port}/")
            page.evaluate(OPEN)
            parts = [texts[at : at + TOGETHER] for at in range(0, len(texts), TOGETHER)]
            return [label for part in parts for label in page.evaluate(ANSWER % json.dumps(part))]
        finally:
            browser.close()
            serving.shutdown()


if __name__ == "__main__":
    main()
