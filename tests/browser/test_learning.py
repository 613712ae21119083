"""A tab learns what the native device learns: the same examples give the same adapter, up to rounding."""

import base64
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner

from aggregation.errors import TrustError
from aggregation.pki.identity import IdentityKey
from client.cli import device
from client.inference.library import Library
from client.inference.session import ClassificationSession
from client.learning import Correction, Learner
from client.learning.learner import LEARNING_RATE, Answers
from client.training import graphengine
from client.training.examples import Example
from client.training.trainer import ClassifierTrainer
from edgeadapt.formats import container, storage
from edgeadapt.formats.bundle import BASE, TRAINING
from edgeadapt.formats.bundle import PHRASES as PHRASES_FILE
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.manifest import AdapterManifest
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.exported import ExportedBase, Profile
from tests.browser.conftest import IN_BROWSER
from tests.browser.test_page import IN_USE, ROWS
from tests.support.bundles import flip, resign_base, stated
from tests.support.models import LABELS, PHRASES
from tests.support.nodetab import OPEN, NodeTab

pytestmark = pytest.mark.slow

RESULT = "document.getElementById('teach-result').textContent"
GRADIENTS = f"""(async (given) => {{ {OPEN}
  const trainer = await GraphTrainer.open(engine, adapter);
  const values = await trainer.valuesOf(adapter.inputs);
  const {{ loss, gradients }} = await trainer.gradients(values, examples(given), async () => {{}});
  return {{ loss, gradients: all(gradients) }};
}})"""
TUNED = f"""(async ({{ taught, rehearsed }}) => {{ {OPEN}
  const trainer = await GraphTrainer.open(engine, adapter);
  const start = await trainer.valuesOf(adapter.inputs);
  const found = await tune(trainer, start, examples(taught), examples(rehearsed), async () => {{}});
  return {{ steps: found.steps, values: all(found.values) }};
}})"""
PROBED = f"""(async () => {{ {OPEN}
  const training = engine.training.bind(engine);
  let probe;
  engine.training = (open) => training(async (session) => {{
    const found = await open(session);
    probe = found.probe;
    return found;
  }});
  const trainer = await GraphTrainer.open(engine, adapter);
  const values = await trainer.valuesOf(adapter.inputs);
  const {{ loss, gradients }} = await trainer.gradients(values, trainer.probes(), async () => {{}});
  const numbers = (arrays) => arrays.map((each) => [...each]);
  return {{ probed: numbers(await probe()), expected: numbers([[loss], ...gradients.values()]) }};
}})()"""  # what WebGPU is compared with: the numbers of a lesson

IN_BOTH = pytest.mark.parametrize("trainable", [Profile.FP32, Profile.NATIVE_INT8], ids=str, indirect=True)


def native(bundle: Path) -> tuple[ClassifierTrainer, Tensors]:
    library = Library.open(bundle, None)
    adapter = library.trust.adapter("global", library.base)
    assert adapter.manifest.peft_config is not None
    trainer = graphengine.classifier(library.base, len(adapter.manifest.labels), adapter.manifest.peft_config)
    return trainer, trainer.engine.tensors_of(adapter.inputs)


def by_input(trainer: ClassifierTrainer, tensors: Tensors) -> Tensors:
    """Tensors under peft's names as the page has them: transposed, without the scaling."""
    return {
        name.removeprefix("base_model.model."): value if "lora_R" in name or "lora" not in name else value.T
        for name, value in tensors.items()
    }


def same(found: dict[str, str], expected: Tensors, within: float) -> None:
    assert set(found) == set(expected)
    for name, text in found.items():
        value = np.frombuffer(base64.b64decode(text), np.float32)
        np.testing.assert_allclose(value, expected[name].ravel(), rtol=0, atol=within, err_msg=name)


@pytest.mark.parametrize("trainable", [Profile.FP32, Profile.NATIVE_INT8, Profile.WEB_INT8], ids=str, indirect=True)
def test_the_gradients_of_a_batch_are_those_of_the_native_device(tab: NodeTab, phone: Path) -> None:
    """In several runs of the graph, since the texts have more tokens than one takes."""
    tab.open(phone)
    gradients_as_natively(tab, phone, [*PHRASES, *(f"{text} and {other}" for text in PHRASES for other in PHRASES)])


@pytest.mark.exhaustive
@IN_BOTH
def test_the_gradients_of_a_batch_on_webgpu_are_those_of_the_native_device(
    page: Any, serve: Callable[[Path], str], phone: Path
) -> None:
    page.goto(f"{serve(phone)}?provider=webgpu")
    page.evaluate(IN_BROWSER)
    gradients_as_natively(page, phone, [PHRASES[0], PHRASES[1] * 2])


def gradients_as_natively(tab: Any, phone: Path, texts: list[str]) -> None:
    examples = [Example(text, number % len(LABELS)) for number, text in enumerate(texts)]
    shares = [1 / (2 + number) for number in range(len(texts))]
    trainer, start = native(phone)
    loss, gradients = trainer.engine.gradients(start, trainer.weighted(examples, shares))
    given = [(one.text, one.label, share) for one, share in zip(examples, shares, strict=True)]
    found = tab.evaluate(f"{GRADIENTS}({json.dumps(given)})")
    assert found["loss"] == pytest.approx(loss, abs=1e-5)
    same(found["gradients"], by_input(trainer, gradients), 1e-5)


def test_a_probe_is_of_the_values_that_a_lesson_begins_with(tab: NodeTab, phone: Path) -> None:
    tab.open(phone)
    probed_at_values(tab)


def probed_at_values(tab: NodeTab) -> None:
    found = tab.evaluate(PROBED)
    assert len(found["expected"]) > 2
    for ours, theirs in zip(found["expected"], found["probed"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-6, abs=1e-9)


@IN_BOTH
def test_the_same_corrections_tune_the_same_adapter(tab: NodeTab, phone: Path) -> None:
    taught, rehearsed = [Example(PHRASES[0], 3)], [Example(text, 1) for text in PHRASES[1:4]]
    trainer, start = native(phone)
    steps = list[int]()
    expected = trainer.teach(start, taught, rehearsed, LEARNING_RATE, lambda: steps.append(1))
    tab.open(phone)
    pairs = (("taught", taught), ("rehearsed", rehearsed))
    given = {kind: [(one.text, one.label) for one in examples] for kind, examples in pairs}
    found = tab.evaluate(f"{TUNED}({json.dumps(given)})")
    assert found["steps"] == len(steps) > 3
    same(found["values"], by_input(trainer, expected), 1e-4)


# --- the page: learning, undoing, keeping and saving


def taught_in(page: Any, text: str, label: str) -> dict[str, Any]:
    """Teach a phrase as a person does; returns what the page shows, and which adapter is in use."""
    page.evaluate(f"document.getElementById('phrase').value = {text!r}")
    page.evaluate(f"document.getElementById('teach-label').value = {label!r}")
    page.evaluate("document.getElementById('teach-form').requestSubmit()")
    page.until("document.getElementById('teach-cancel').disabled")
    return {"shown": page.evaluate(RESULT), "error": page.alert("teach-error"), "in use": page.evaluate(IN_USE)}


def answers(page: Any, text: str) -> list[tuple[str, float]]:
    page.evaluate(f"document.getElementById('phrase').value = {text!r}")
    page.evaluate("document.getElementById('answer-caption').textContent = ''")
    page.evaluate("document.getElementById('classify-form').requestSubmit()")
    page.until("document.getElementById('answer-caption').textContent !== ''")
    return [(label, float(probability)) for label, probability in page.evaluate(ROWS)]


def public(bundle: Path, vendor: IdentityKey, exported: ExportedBase) -> None:
    """Put public phrases into the bundle, with the answers of the global adapter."""
    session = ClassificationSession.open(bundle)
    rows = [f"{session.classify([text], 'global')[0].label}\t{text}\n" for text in PHRASES[1:]]
    (bundle / BASE / PHRASES_FILE).write_text("".join(rows) + "Unknown\ta label that the adapter lacks\n")
    digest = storage.file_sha256(bundle / BASE / PHRASES_FILE)
    resign_base(bundle, vendor, files={**exported.manifest.files, PHRASES_FILE: digest})


def other(bundle: Path, text: str = PHRASES[0]) -> str:
    """A label that the global adapter does not answer."""
    found = ClassificationSession.open(bundle).classify([text], "global")[0].label
    return next(label for label in LABELS if label != found)


@pytest.mark.parametrize("trainable", [Profile.NATIVE_INT8], ids=str, indirect=True)
def test_a_lesson_gives_the_adapter_and_the_answers_of_the_native_device_and_is_there_after_a_reload(
    page: Any, serve: Callable[[Path], str], phone: Path, trainable: ExportedBase, vendor: IdentityKey
) -> None:
    public(phone, vendor, trainable)
    label, url = other(phone), serve(phone)
    page.goto(url)
    found = taught_in(page, PHRASES[0], label)
    assert found["error"] == ""
    assert found["in use"].startswith("In use: personal,")
    assert all(one.startswith(url) and "kitchen" not in one for one in page.requests()), "nothing of it leaves the tab"
    for _ in range(2):
        shown = answers(page, PHRASES[0])
        assert shown[0][0] == label
        page.goto(url)
    with Learner.open(phone) as learner:
        learned = learner.teach([Correction(PHRASES[0], label)])
    head = f"personal version 4: 1 of 1 learned, {learned.steps} steps"
    assert found["shown"].startswith(head)
    changed = sum(isinstance(answer, Answers) and answer.changed for answer in learned.others)
    assert f"{changed} of {len(learned.others)} other known phrases" in found["shown"]
    session = ClassificationSession.open(phone)
    for text in PHRASES:
        expected = session.rank([text], "personal", 5)[0]
        assert answers(page, text) == [(one.label, pytest.approx(one.probability, abs=0.03)) for one in expected]


def test_a_correction_replaces_an_earlier_one_that_the_model_reads_as_the_same_phrase(
    tab: NodeTab, phone: Path
) -> None:
    first = ClassificationSession.open(phone).classify([PHRASES[0]], "global")[0].label
    tab.open(phone)
    corrections = [(PHRASES[0], other(phone), "global"), (PHRASES[0].upper(), first, "personal")]
    assert tab.evaluate(f"{TAUGHT}({json.dumps(corrections)}, {PHRASES[0]!r})")[0]["label"] == first


def test_lessons_are_undone_one_after_the_other(page: Any, serve: Callable[[Path], str], phone: Path) -> None:
    before = [one.label for one in ClassificationSession.open(phone).classify(PHRASES[:2], "global")]
    page.goto(serve(phone))
    first, second = other(phone), other(phone, PHRASES[1])
    taught_in(page, PHRASES[0], first)
    once = answers(page, PHRASES[1])
    assert taught_in(page, PHRASES[1], second)["shown"].startswith("personal version 5: 1 of 1 learned")
    for expected, shown in (("personal", f"“{PHRASES[1]}” as {second}"), ("global", f"“{PHRASES[0]}” as {first}")):
        page.evaluate("document.getElementById('teach-undo').click()")
        page.until("document.getElementById('teach-cancel').disabled")
        assert page.alert("teach-error") == ""
        assert page.evaluate(RESULT) == f"Undone: {shown}"
        assert page.evaluate(IN_USE).startswith(f"In use: {expected},")
        if expected == "personal":
            assert answers(page, PHRASES[1]) == once
    assert [answers(page, text)[0][0] for text in PHRASES[:2]] == before
    assert page.evaluate("document.getElementById('teach-undo').disabled")
    assert page.errors() == []


def test_saved_files_answer_on_a_native_device_and_open_in_onnxruntime(
    page: Any, serve: Callable[[Path], str], phone: Path, tmp_path: Path
) -> None:
    label, saved = other(phone), tmp_path / "saved"
    page.goto(serve(phone))
    taught_in(page, PHRASES[0], label)
    shown = answers(page, PHRASES[0])
    page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(saved))
    page.evaluate("document.getElementById('teach-files').click()")
    names = ["personal.json", "personal.onnx_adapter", "personal.pem"]
    end = time.monotonic() + 60
    while time.monotonic() < end and sorted(path.name for path in saved.glob("*")) != names:
        time.sleep(0.05)
    assert sorted(path.name for path in saved.glob("*")) == names
    assert stated(phone).card
    assert AdapterManifest.unverified((saved / names[0]).read_bytes()).card is None
    for name in names[:2]:
        shutil.copyfile(saved / name, phone / "adapters" / name)
    arguments = ["infer", "--bundle", str(phone), "--adapter", "personal", "--json", PHRASES[0]]
    assert isinstance(CliRunner().invoke(device, arguments).exception, TrustError), "its key is not pinned yet"
    with (tmp_path / "trust.pem").open("ab") as pinned:
        pinned.write((saved / "personal.pem").read_bytes())
    done = CliRunner().invoke(device, arguments, catch_exceptions=False)
    (answer,) = json.loads(done.stdout)["adapters"][0]["answers"]
    assert answer["intents"] == [{"intent": label, "probability": pytest.approx(shown[0][1], abs=0.03)}]
    stored = ort.AdapterFormat.read_adapter(str(saved / names[1])).get_parameters()
    for name, value in container.unpack((saved / names[1]).read_bytes()).items():
        assert np.array_equal(stored[name].numpy(), value)


# --- what must not change the adapter in use

TAUGHT = """(async (corrections, text) => {
  const engine = await opened();
  const { Learner } = await load("learning/learner");
  for (const [text, label, name] of corrections) await new Learner(engine).teach(name, [{ text, label }]);
  await engine.use("personal");
  return (await engine.rank(text, 10)).labels;
})"""  # the answers of the private adapter
HANGING = """(async ({ text, label }) => {
  const engine = await opened();
  const { Learner } = await load("learning/learner");
  const pause = (steps) => (steps < 2 ? undefined : (globalThis.reached = true, new Promise(() => {})));
  new Learner(engine).teach("global", [{ text, label }], pause);
  return true;
})"""
WITHOUT_ROOM = """(async ({ text, label, how }) => {
  const engine = await opened();
  const { Learner } = await load("learning/learner");
  const put = IDBObjectStore.prototype.put;
  IDBObjectStore.prototype.put = function (...given) {
    if (this.name !== "learned") return put.apply(this, given);
    if (how === "refused") throw new DOMException("no room", "QuotaExceededError");
    const request = put.apply(this, given);
    this.transaction.abort();
    return request;
  };
  try {
    await new Learner(engine).teach("global", [{ text, label }]);
  } finally {
    IDBObjectStore.prototype.put = put;
  }
})"""
CANCELED = """(async (corrections) => {
  const { Client } = await import("/client.js");
  const client = new Client();
  await client.open();
  const done = client.teach("global", corrections);
  client.stop();
  await done;
})"""
TEACH = """(async ({ name = "global", corrections, compared = [] }) => {
  globalThis.engine ??= await opened();
  const { Learner } = await load("learning/learner");
  await new Learner(engine).teach(name, corrections, async () => {}, compared);
})"""


def unchanged(page: Any, url: str, label: str) -> None:
    """The global adapter is in use after a reload, and a lesson succeeds."""
    page.goto(url)
    assert page.evaluate(IN_USE).startswith("In use: global,")
    assert taught_in(page, PHRASES[0], label)["in use"].startswith("In use: personal,")


def test_a_tab_that_is_closed_in_the_middle_leaves_the_adapter_in_use_and_two_lessons_at_once_get_one_line(
    page: Any, serve: Callable[[Path], str], phone: Path
) -> None:
    url, label = serve(phone), other(phone)
    page.goto(url)
    page.evaluate(IN_BROWSER)
    correction = {"text": PHRASES[0], "label": label}
    failed = page.error(f"{CANCELED}({json.dumps([correction])})")
    assert (failed["about"], "\n" in failed["message"]) == ("stop", False)
    page.evaluate(f"{HANGING}({json.dumps(correction)})")
    page.until("globalThis.reached === true")
    found = taught_in(page, PHRASES[0], label)
    assert "another tab is learning with this bundle" in found["error"]
    assert found["in use"].startswith("In use: global,")
    unchanged(page, url, label)


def test_a_full_disk_leaves_the_adapter_in_use(page: Any, serve: Callable[[Path], str], phone: Path) -> None:
    url, label = serve(phone), other(phone)
    page.goto(url)
    page.evaluate(IN_BROWSER)
    for how in ("refused", "aborted"):
        failed = page.error(f"{WITHOUT_ROOM}({json.dumps({'text': PHRASES[0], 'label': label, 'how': how})})")
        assert (failed["name"], failed["about"]) == ("ConfigError", "learned")
    unchanged(page, url, label)


def test_wrong_input_is_refused_with_one_line(tab: NodeTab, phone: Path) -> None:
    label, text = other(phone), PHRASES[0]
    tab.open(phone)
    for corrections, more, about in (
        ([], {}, "corrections"),
        ([(text, label)], {"compared": [{"text": "what a language model forgets"}]}, "compared"),
        ([(text, label)] * 2, {}, "corrections"),
        ([(str(number), label) for number in range(65)], {}, "corrections"),
        ([(text, "Nothing")], {}, "label"),
        ([(" ", label)], {}, "text"),
        ([("light " * 400, label)], {}, "text"),
        ([("🎵", label)], {}, "text.tokens"),
        ([(text, label)], {"name": "nobody"}, "nobody.json"),
        ([(text, label)], {"name": "../global"}, "name"),
    ):
        given = more | {"corrections": [{"text": each, "label": chosen} for each, chosen in corrections]}
        failed = tab.error(f"{TEACH}({json.dumps(given)})")
        assert (failed["about"], "\n" in failed["message"]) == (about, False), failed
    assert tab.evaluate("engine.adapterNames()") == ["global"]


def refused(tab: NodeTab, text: str = PHRASES[0], label: str = LABELS[0]) -> str:
    return tab.error(f"{TEACH}({json.dumps({'corrections': [{'text': text, 'label': label}]})})")["message"]


def test_a_training_graph_that_is_altered_is_refused_before_and_after_the_bundle_is_opened(
    tab: NodeTab, phone: Path
) -> None:
    tab.open(phone)
    tab.evaluate("opened().then((engine) => { globalThis.engine = engine; })")
    flip(phone / BASE / TRAINING, 0.5)
    stated = f"base/{TRAINING} does not match the digest in its manifest"
    assert stated in refused(tab)
    assert tab.evaluate("engine.adapterNames()") == ["global"]
    assert stated in tab.error("opened()")["message"]


def test_a_bundle_or_an_adapter_that_cannot_be_trained_is_refused_with_the_remedy(
    tab: NodeTab,
    bundle: Path,
    first: AdapterSource,
    vendor: IdentityKey,
    exported: ExportedBase,
    trainable: ExportedBase,
) -> None:
    write_bundle(bundle, exported, [first], key=vendor)
    tab.open(bundle)
    assert "bundle make --training" in refused(tab)
    write_bundle(bundle, trainable, [replace(first, peft_config=None)], key=vendor)
    tab.open(bundle)
    assert "does not state its PEFT config" in refused(tab)
