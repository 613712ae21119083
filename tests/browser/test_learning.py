"""A tab learns what the native device learns: the same examples give the same adapter, up to rounding."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel

from adapters.base import Base
from adapters.layout import Tensors
from adapters.peftconfig import PeftConfig
from aggregation.pki.identity import IdentityKey
from client.inference.library import Library
from client.learning.tune import tune
from client.training.examples import Example
from client.training.graphtrainer import GraphTrainer
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from tests.support.models import LABELS, PHRASES, draw

pytestmark = pytest.mark.slow

CONFIG = PeftConfig.lora(rank=4, alpha=8)
HEAD = 2e-4  # of the values of ``draw``: so small that 30 steps of a tiny base change answers
OPEN = """
  const load = (name) => import(`/${name}.js`);
  const [{ Engine }, { HttpSource }] = await Promise.all([load("engine"), load("sources")]);
  const [{ GraphTrainer }, { tune }] = await Promise.all([load("learning/trainer"), load("learning/tune")]);
  const here = new URL("/", location.href);
  const source = new HttpSource(new URL("bundle/", here), new URL("bundle.json", here));
  const engine = await Engine.open(source, await (await fetch("/trust.pem")).text());
  const adapter = await engine.trust.adapter(source, engine.base, "global");
  const written = (values) => btoa(Array.from(new Uint8Array(values.buffer), (b) => String.fromCharCode(b)).join(""));
  const all = (map) => Object.fromEntries([...map].map(([name, values]) => [name, written(values)]));
  const examples = (found) => found.map(([text, target, share]) => ({ ids: trainer.tokens(text), target, share }));
"""
GRADIENTS = f"""(async (given) => {{ {OPEN}
  const trainer = await GraphTrainer.open(engine, adapter);
  const values = trainer.valuesOf(adapter.inputs);
  const {{ loss, gradients }} = await trainer.gradients(values, examples(given), async () => {{}});
  return {{ loss, gradients: all(gradients) }};
}})"""
TUNED = f"""(async ({{ taught, rehearsed }}) => {{ {OPEN}
  const trainer = await GraphTrainer.open(engine, adapter);
  const start = trainer.valuesOf(adapter.inputs);
  const found = await tune(trainer, start, examples(taught), examples(rehearsed), async () => {{}});
  return {{ steps: found.steps, values: all(found.values) }};
}})"""


@pytest.fixture(scope="module", params=[Profile.FP32, Profile.NATIVE_INT8], ids=str)
def trainable(request: Any, model: PeftModel, tiny_base: Base, trace_once: object) -> ExportedBase:
    return export_classifier(model, tiny_base, request.param, training=True)


@pytest.fixture(scope="module")
def first(model: PeftModel) -> AdapterSource:
    """A global adapter whose answers are nearly undecided."""
    values = {name: value * np.float32(HEAD if "classifier" in name else 1) for name, value in draw(model, 0).items()}
    return AdapterSource("global", values, LABELS, 3, "c" * 64, None, CONFIG, epsilon=3.0)


@pytest.fixture
def phone(tmp_path: Path, trainable: ExportedBase, first: AdapterSource, vendor: IdentityKey) -> Path:
    """A bundle that can learn, with a global adapter."""
    write_bundle(tmp_path / "bundle", trainable, [first], key=vendor, form="fp32")
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    return tmp_path / "bundle"


def native(bundle: Path) -> tuple[GraphTrainer, Tensors]:
    library = Library.open(bundle, None)
    trainer = GraphTrainer(library.base, len(LABELS), CONFIG)
    return trainer, trainer.tensors_of(library.trust.adapter("global", library.base).inputs)


def by_input(trainer: GraphTrainer, tensors: Tensors) -> Tensors:
    """Tensors under peft's names as the page has them: transposed, without the scaling."""
    return {
        name.removeprefix("base_model.model."): value.T if "lora" in name else value for name, value in tensors.items()
    }


def same(found: dict[str, str], expected: Tensors, within: float) -> None:
    assert set(found) == set(expected)
    for name, text in found.items():
        value = np.frombuffer(base64.b64decode(text), np.float32)
        np.testing.assert_allclose(value, expected[name].ravel(), rtol=0, atol=within, err_msg=name)


def test_the_gradients_of_a_batch_are_those_of_the_native_device(
    page: Any, serve: Callable[[Path], str], phone: Path
) -> None:
    """In several runs of the graph, since the texts have more tokens than one takes."""
    texts = [*PHRASES, *(f"{text} and {other}" for text in PHRASES for other in PHRASES)]
    examples = [Example(text, number % len(LABELS)) for number, text in enumerate(texts)]
    shares = [1 / (2 + number) for number in range(len(texts))]
    trainer, start = native(phone)
    loss, gradients = trainer.gradients(start, examples, shares)
    page.goto(serve(phone))
    given = [(one.text, one.label, share) for one, share in zip(examples, shares, strict=True)]
    found = page.evaluate(f"{GRADIENTS}({json.dumps(given)})")
    assert found["loss"] == pytest.approx(loss, abs=1e-5)
    same(found["gradients"], by_input(trainer, gradients), 1e-5)


def test_the_same_corrections_tune_the_same_adapter(page: Any, serve: Callable[[Path], str], phone: Path) -> None:
    taught, rehearsed = [Example(PHRASES[0], 3)], [Example(text, 1) for text in PHRASES[1:4]]
    trainer, start = native(phone)
    expected = tune(trainer, start, taught, rehearsed)
    page.goto(serve(phone))
    given = {
        kind: [(one.text, one.label) for one in found] for kind, found in (("taught", taught), ("rehearsed", rehearsed))
    }
    found = page.evaluate(f"{TUNED}({json.dumps(given)})")
    assert found["steps"] == expected.steps > 3
    same(found["values"], by_input(trainer, expected.adapter), 1e-4)
