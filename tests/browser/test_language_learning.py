"""A tab teaches a language model what the native device teaches it: the same correction gives the same adapter."""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from aggregation import rotation
from aggregation.pki.identity import IdentityKey
from client.cli import device
from client.inference.library import Library
from client.learning.learner import LANGUAGE_RATE
from client.training import graphengine
from client.training.examples import Example
from client.training.trainer import MAX_STEPS, LanguageTrainer
from edgeadapt.formats import jsontext, storage
from edgeadapt.formats.bundle import BASE, TRAINING
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.parts import Part
from edgeadapt.rounds.sums import clip
from edgeadapt.rounds.task import Task
from export.bundle.write import AdapterSource, write_bundle
from export.causal import export_causal
from export.onnx.exported import ExportedBase, Profile
from tests.browser.test_aggregation import session_of
from tests.browser.test_learning import IN_USE, TEACH, by_input, refused, same
from tests.browser.test_training import ROUND, WAY, b64
from tests.browser.test_training import given as planned
from tests.client.learning.test_language_step import of_another_layout, without_gradient
from tests.support.bundles import flip, resign_base
from tests.support.nodetab import OPEN, NodeTab

pytestmark = pytest.mark.slow

LORA = PeftConfig.lora(rank=4, alpha=8, targets=("q_proj", "v_proj"))
IN_BOTH = pytest.mark.parametrize("talking", [Profile.FP32, Profile.NATIVE_INT8], ids=str, indirect=True)
PROMPT, ANSWER = "is it?", "yes"
SMALL = np.float32(0.2)
GRADIENTS = f"""(async (given) => {{ {OPEN}
  const {{ LanguageGraphTrainer }} = await load("learning/languagegraph");
  const {{ encoded }} = await load("learning/languagegraph");
  const trainer = await LanguageGraphTrainer.open(engine, adapter);
  const example = ([prompt, answer, share]) => ({{ ...encoded({{ prompt, text: answer }}, engine.generation), share }});
  const texts = given.map(example);
  const found = await trainer.gradients(await trainer.valuesOf(adapter.inputs), texts, async () => {{}});
  return {{ examples: texts, loss: found.loss, scores: found.scores, gradients: all(found.gradients) }};
}})"""
TUNED = f"""(async (given) => {{ {OPEN}
  const {{ teachLanguageModel }} = await load("learning/language");
  const {{ LanguageGraphTrainer }} = await load("learning/languagegraph");
  const pause = async () => {{}};
  const found = await teachLanguageModel(engine, adapter, given.corrections, given.earlier, pause, given.compared);
  const trainer = await LanguageGraphTrainer.open(engine, adapter);
  return {{ ...found, values: all(await trainer.valuesOf(found.inputs)), inputs: null }};
}})"""
OBSERVE = """(() => {
  globalThis.seen = [];
  const result = document.getElementById("teach-result");
  new MutationObserver(() => seen.push(result.textContent)).observe(result, { childList: true });
})()"""
COMPARED = f"""(async (given) => {{ {OPEN}
  const {{ Learner }} = await load("learning/learner");
  const seen = [];
  const pause = async (steps, comparing) => {{
    if (!comparing) return;
    seen.push(comparing);
    if (given.stop) throw new Error("stop");
  }};
  const taught = new Learner(engine).teach(given.name ?? "global", given.corrections, pause, given.compared);
  const found = await taught.catch(({{ about }}) => ({{ about }}));
  return {{ ...found, seen, names: await engine.adapterNames() }};
}})"""
STOPPED = """(async ({ corrections }) => {
  const { Learner } = await load("learning/learner");
  await new Learner(engine).teach("global", corrections, async () => { throw new Error("stop"); });
})"""


@pytest.fixture(scope="module")
def exports(lm_base: Any) -> Callable[[Profile], ExportedBase]:
    return cache(lambda profile: export_causal(lm_base, LORA.target_modules, profile, training=True))


@pytest.fixture
def talking(request: Any, exports: Callable[[Profile], ExportedBase]) -> ExportedBase:
    return exports(getattr(request, "param", Profile.FP32))


@pytest.fixture
def talker(tmp_path: Path, talking: ExportedBase, lm_source: Callable[..., AdapterSource], vendor: IdentityKey) -> Path:
    """A bundle of a language model that can learn, with a global adapter, whose small values keep rounding small."""
    source = lm_source(peft_config=LORA)
    small = replace(source, tensors={name: SMALL * value for name, value in source.tensors.items()})
    write_bundle(tmp_path / "bundle", talking, [small], key=vendor, form="fp32")
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    return tmp_path / "bundle"


def native(bundle: Path, name: str) -> tuple[LanguageTrainer, Tensors]:
    library = Library.open(bundle, None)
    trainer = graphengine.language(library.base, LORA)
    return trainer, trainer.engine.tensors_of(library.trust.adapter(name, library.base).inputs)


def given(*corrections: tuple[str, str], **more: Any) -> str:
    return json.dumps(more | {"corrections": [{"text": text, "label": label} for text, label in corrections]})


@IN_BOTH
def test_tokens_learned_places_losses_and_gradients_are_those_of_the_native_device(tab: NodeTab, talker: Path) -> None:
    """In several runs of the graph, of texts of several lengths; one is longer than what is learned."""
    pairs = [("is it?", "yes"), ("a", "no, never"), ("where is\nthe key?", "under the mat " * 4), ("why", "ab" * 80)]
    pairs += [("", "abab abab"), ("", "ab" * 80)]
    shares = [1 / (2 + number) for number in range(3 * len(pairs))]
    examples = [Example(answer, prompt=prompt) for prompt, answer in 3 * pairs]
    trainer, start = native(talker, "global")
    tab.open(talker)
    sent = [(*pair, share) for pair, share in zip(3 * pairs, shares, strict=True)]
    found = tab.evaluate(f"{GRADIENTS}({json.dumps(sent)})")
    for theirs, example in zip(found["examples"], examples, strict=True):
        ours = trainer.encoder.encode(example)
        assert theirs["ids"] == ours.ids.tolist()
        assert list(range(theirs["first"] - 1, len(theirs["ids"]) - 1)) == ours.positions.tolist()
        assert (theirs["cut"], theirs["size"]) == (ours.cut, ours.size)
    loss, gradients = trainer.engine.gradients(start, trainer.weighted(examples, shares))
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    largest = max(float(np.abs(gradient).max()) for gradient in gradients.values())
    same(found["gradients"], by_input(trainer, gradients), 1e-5 * largest)
    expected = [trainer.score(start, [one]) for one in examples]
    assert [one["hits"] for one in found["scores"]] == pytest.approx([one.correct for one in expected])
    assert [one["nats"] for one in found["scores"]] == pytest.approx([one.loss for one in expected], rel=1e-5)


@IN_BOTH
def test_the_same_corrections_tune_the_same_adapter_and_show_the_same_bits(tab: NodeTab, talker: Path) -> None:
    """One of two corrections that were taught earlier is rehearsed: the other one is corrected again. Of the texts that
    are compared, which take several runs of the graph, nothing is learned.
    """
    taught, earlier = [("or not?", ANSWER), (PROMPT, ANSWER)], [("who?", "me"), (PROMPT, "maybe")]
    trainer, start = native(talker, "global")
    ours = [[Example(answer, prompt=prompt) for prompt, answer in pairs] for pairs in (taught, earlier[:1])]

    steps = list[int]()
    expected = trainer.teach(start, *ours, LANGUAGE_RATE, lambda: steps.append(1))
    compared = [Example("abab abab"), Example("no, never", prompt="a"), *(Example("ab" * 80) for _ in range(5))]
    tab.open(talker)
    pairs = {"earlier": [{"text": text, "label": label} for text, label in earlier]}
    texts = {"compared": [{"text": one.text, "prompt": one.prompt} for one in compared]}
    found = tab.evaluate(f"{TUNED}({given(*taught, **pairs, **texts)})")
    assert MAX_STEPS > found["steps"] == len(steps) > 1
    assert found["known"] == len(taught)
    same(found["values"], by_input(trainer, expected), 1e-4)
    assert [(one["prompt"], one["text"]) for one in found["compared"]] == [(one.prompt, one.text) for one in compared]
    for kind, examples in zip(("taught", "others", "compared"), [*ours, compared], strict=True):
        if kind != "compared":
            assert [(one["text"], one["label"]) for one in found[kind]] == [(one.prompt, one.text) for one in examples]
        for when, adapter in (("before", start), ("after", expected)):
            nats = [trainer.score(adapter, [one]).loss for one in examples]
            assert [one[when] * math.log(2) for one in found[kind]] == pytest.approx(nats, rel=1e-3)


def test_a_tab_contributes_to_a_round_what_a_native_device_contributes_or_nothing(tab: NodeTab, talker: Path) -> None:
    tab.open(talker)
    contributes_as_natively(tab, *native(talker, "global"), (Part.A, Part.B))


def contributes_as_natively(tab: NodeTab, trainer: LanguageTrainer, start: Tensors, parts: tuple[Part, ...]) -> None:
    """All texts are in one batch, so that their order makes no difference."""
    task = Task(trainer.engine.config, (), 3, 16, 0.005, 0.01, 0.0, parts, parts)
    own = [*(Example(text) for text in ("abab abab", "ba ba", "abba")), Example(ANSWER, prompt=PROMPT)]
    held = [Example("abab ab"), Example("no, never", prompt="a")]
    expected = trainer.train(start, own, task, epochs=task.epochs, rng=np.random.default_rng(1))
    sent = [(one, "train") for one in own] + [(one, "validation") for one in held]
    rows = [{"text": one.text, "prompt": one.prompt, "split": split} for one, split in sent]
    asked = planned(task, trainer, start, []) | {"examples": rows}
    spec = replace(session_of(trainer.layout, 32), layout_digest=trainer.layout.digest)

    def sums(**changes: Any) -> Any:
        packed = tab.evaluate(f"{ROUND}({json.dumps(asked | changes)})")["packed"]
        return spec.vector.decode(np.frombuffer(bytes(packed), np.uint32), 1)

    found, score = sums(), trainer.score(start, held)
    before, after = (trainer.layout.flatten(one).astype(np.float64) for one in (start, expected))
    delta = clip(after - before, spec.clip_norm) * len(own)
    delta = rotation.rotate(delta, rotation.seed(bytes.fromhex(asked["plan"]["adapter"])))
    step = spec.vector.step(spec.vector.segment("delta"))
    away = float(np.linalg.norm(found["delta"] - delta))
    assert away < WAY * float(np.linalg.norm(delta)) + 1.5 * step * trainer.layout.size**0.5
    assert (found["weight"][0], found["held_out"][0]) == (len(own), len(held))
    assert (found["correct"][0], found["loss"][0]) == pytest.approx((score.correct, score.loss), abs=1e-3)
    train = {"split": "train"}
    for examples in (
        [],
        [{"text": "b", "prompt": "ab" * 400} | train],
        [{"text": "a<|im_end|>", "prompt": ""} | train],
    ):
        assert sums(examples=examples)["weight"][0] == 0
    for change, about in (({"labels": ["a", "b"]}, "task.labels"), ({"learning_rate": 0.5}, "task.learning_rate")):
        plan = asked["plan"] | {"task": b64(jsontext.encode(json.loads(task.encode()) | change))}
        failed = tab.error(f"{ROUND}({json.dumps(asked | {'plan': plan, 'examples': None})})")
        assert (failed["name"], failed["about"]) == ("ProtocolError", about)


# --- the page: correcting an answer, undoing, keeping and saving


def sent(page: Any, text: str) -> str:
    """Send a message as a person does; returns the answer, or what is wrong."""
    page.evaluate("document.getElementById('max-tokens').value = '8'")
    page.evaluate(f"document.getElementById('prompt').value = {text!r}")
    page.evaluate("document.getElementById('generate-form').requestSubmit()")
    page.until("!document.getElementById('generate-button').disabled")
    assert page.alert("generate-error") == ""
    return str(page.evaluate("document.querySelector('#transcript li:last-of-type p').textContent"))


def begin_again(page: Any) -> None:
    """Begin a new conversation as a person does."""
    page.evaluate("document.getElementById('new-chat').click()")
    page.until("document.getElementById('transcript').children.length === 0")


def corrected(page: Any, answer: str, meanwhile: str = "") -> dict[str, Any]:
    """Correct the last answer as a person does, who maybe begins another correction during the lesson; returns what the
    page shows, and which adapter is in use."""

    def begin(text: str) -> str:
        click = "document.querySelector('#transcript li:last-of-type button').click()"
        return f"{click}; document.getElementById('teach-answer').value = {text!r};"

    then = begin(meanwhile) if meanwhile else ""
    page.evaluate(f"{begin(answer)} document.getElementById('teach-form').requestSubmit(); {then}")
    page.until("document.getElementById('teach-cancel').disabled")
    return shown(page)


def shown(page: Any) -> dict[str, Any]:
    rows = "[...document.querySelectorAll('#teach-changed li')].map((each) => each.textContent)"
    result = page.evaluate("document.getElementById('teach-result').textContent")
    return {
        **{"result": result, "rows": page.evaluate(rows)},
        **{"error": page.alert("teach-error"), "in use": page.evaluate(IN_USE)},
    }


def test_a_corrected_answer_is_given_from_then_on_also_after_a_reload_and_natively_and_is_undone(
    page: Any, serve: Callable[[Path], str], talker: Path, tmp_path: Path
) -> None:
    url, saved = serve(talker), tmp_path / "saved"
    page.goto(url)
    first = sent(page, PROMPT)
    assert first != ANSWER
    texts = tmp_path / "texts.jsonl"
    long = '{"text": "fine"}\n' + json.dumps({"text": "b", "prompt": "ab" * 400})
    number = "texts.jsonl: text 2 to compare: the prompt leaves no room"
    for line, said in (('{"label": 1}', "line 1 of texts.jsonl is not an example"), (long, number)):
        texts.write_text(line)
        page.pick("#teach-compare", texts)
        refused = corrected(page, ANSWER)
        assert said in refused["error"]
        assert refused["in use"].startswith("In use: global,")
    rows = [{"text": "abab\nabab"}, {"text": "never", "prompt": "a", "split": "validation"}, {"text": "ab" * 60}]
    texts.write_text("\n".join(map(json.dumps, rows)))
    page.evaluate(OBSERVE)
    page.pick("#teach-compare", texts)
    found = corrected(page, f" {ANSWER}\n", meanwhile="The next one")
    assert found["error"] == ""
    assert page.evaluate("document.getElementById('teach-answer').value") == "The next one"
    assert page.evaluate("document.getElementById('teach-message').textContent") == PROMPT
    assert not page.evaluate("document.getElementById('teach').disabled")
    assert found["result"].startswith("personal version 4: 1 of 1 learned, ")
    assert "3 texts to compare: " in found["result"]
    ends = (f"“{ANSWER}”", "“abab abab”, compared", "“never”, compared", f" “{'ab' * 30}”, compared")
    assert [row.endswith(end) for row, end in zip(found["rows"], ends, strict=True)] == [True] * len(ends)
    said = page.evaluate("seen")
    assert "Comparing: part 1 of 2 …" in said
    assert not any(f"step {MAX_STEPS + 1} of" in each for each in said)
    assert found["in use"].startswith("In use: personal,")
    assert all(one.startswith(url) for one in page.requests()), "nothing leaves the page's origin"
    begin_again(page)
    assert sent(page, PROMPT) == ANSWER
    page.goto(url)
    assert sent(page, PROMPT) == ANSWER
    files = save(page, saved)
    for name in files[:2]:
        shutil.copyfile(saved / name, talker / "adapters" / name)
    with (tmp_path / "trust.pem").open("ab") as pinned:
        pinned.write((saved / files[2]).read_bytes())
    arguments = ["chat", "--bundle", str(talker), "--prompt", PROMPT, "--max-tokens", "8"]
    assert CliRunner().invoke(device, arguments, catch_exceptions=False).output == f"{ANSWER}\n"
    page.evaluate("document.getElementById('teach-undo').click()")
    page.until("document.getElementById('teach-result').textContent.startsWith('Undone: ')")
    begin_again(page)
    assert sent(page, PROMPT) == first
    assert page.errors() == []


def test_texts_are_compared_after_something_was_learned_and_a_person_may_end_that(tab: NodeTab, talker: Path) -> None:
    compared = {"compared": [{"text": "ab" * 80, "prompt": ""}] * 5}
    tab.open(talker)
    nothing = tab.evaluate(f"{COMPARED}({given((PROMPT, 'Zq%+7' * 15), **compared)})")
    assert (nothing["about"], nothing["seen"], nothing["names"]) == ("corrections", [], ["global"])
    ended = tab.evaluate(f"{COMPARED}({given((PROMPT, ANSWER), stop=True, **compared)})")
    assert (ended["known"], ended["compared"], ended["names"]) == (1, None, ["global", "personal"])
    whole = tab.evaluate(f"{COMPARED}({given(('or not?', 'no'), name='personal', **compared)})")
    parts = len(whole["seen"])
    assert parts > 2
    assert whole["seen"] == [{"part": 1 + number, "of": parts} for number in range(parts)]
    assert len(whole["compared"]) == 5


def save(page: Any, folder: Path) -> list[str]:
    """Save the private adapter to files; returns their names."""
    page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    page.evaluate("document.getElementById('teach-files').click()")
    names, end = ["personal.json", "personal.onnx_adapter", "personal.pem"], time.monotonic() + 60
    while sorted(path.name for path in folder.glob("*")) != names and time.monotonic() < end:
        time.sleep(0.05)
    assert sorted(path.name for path in folder.glob("*")) == names
    return names


# --- what must not change the adapter in use


def test_a_lesson_that_is_ended_and_wrong_input_leave_the_adapter_in_use(tab: NodeTab, talker: Path) -> None:
    """What ends a lesson is the same code as of a classifier (test_learning.py)."""
    tab.open(talker)
    for corrections, about in (
        ([], "corrections"),
        ([(PROMPT, ANSWER)] * 2, "corrections"),
        ([(PROMPT, "b" * 2001)], "label"),
        ([(PROMPT, "Zq%+7 " * 60)], "label"),  # has more tokens than are read
        ([(PROMPT, " ")], "text"),
        ([("ab" * 400, "b")], "text"),  # leaves no room for an answer
        ([(PROMPT, "<|im_end|>")], "message"),
    ):
        failed = tab.error(f"{TEACH}({given(*corrections)})")
        assert (failed["about"], "\n" in failed["message"]) == (about, False), failed
    assert tab.error(f"{STOPPED}({given((PROMPT, ANSWER))})")["message"] == "stop"
    assert tab.evaluate("engine.adapterNames()") == ["global"]


def test_a_training_graph_that_is_altered_or_of_another_layout_or_absent_gets_one_line_or_no_button(
    tab: NodeTab,
    page: Any,
    serve: Callable[[Path], str],
    talker: Path,
    talking: ExportedBase,
    lm_bundle: Path,
    vendor: IdentityKey,
) -> None:
    graph = talker / BASE / TRAINING
    original = graph.read_bytes()
    tab.open(talker)
    tab.evaluate("opened().then((engine) => { globalThis.engine = engine; })")
    flip(graph, 0.5)
    assert f"base/{TRAINING} does not match the digest in its manifest" in refused(tab, PROMPT, ANSWER)
    for change, said in ((without_gradient, "has no gradient of"), (of_another_layout, "")):
        model = onnx.load_from_string(original)
        change(model)
        graph.write_bytes(model.SerializeToString())
        resign_base(talker, vendor, files=talking.manifest.files | {TRAINING: storage.file_sha256(graph)})
        tab.open(talker)
        message = refused(tab, PROMPT, ANSWER)
        assert said in message
        assert "\n" not in message
        assert tab.evaluate("engine.adapterNames()") == ["global"]
    page.goto(serve(lm_bundle))
    assert sent(page, PROMPT)
    assert page.evaluate("document.querySelector('#transcript button')") is None
    assert page.evaluate("document.getElementById('learn').hidden") is True
