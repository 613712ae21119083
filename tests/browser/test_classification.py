"""A tab gives the answers of the native session, for every adapter and number format."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from aggregation.pki.identity import IdentityKey
from client.inference.generate import Generator
from client.inference.session import ClassificationSession
from client.inference.text import SamplingParams
from edgeadapt.bases.base import Base
from edgeadapt.formats.manifest import Format
from export.bundle.write import write_bundle
from export.onnx.exported import ExportedBase
from tests.browser.test_generation import PROMPT, begin, ids_of
from tests.export.causal.test_vectors import BASES, every_method_written
from tests.support import methods, virtual
from tests.support.models import Source
from tests.support.nodetab import NodeTab
from tests.support.recipes import CLI

pytestmark = pytest.mark.slow

PHRASES = ("turn on the kitchen lights", "Lock the DOOR", "set a timer for ten minutes", "unlock")
RANK = """(async () => {
  const engine = await opened();
  await engine.use(%r);
  const found = [];
  for (const phrase of %r) found.push((await engine.rank(phrase, 10)).labels);
  return found;
})()"""


def in_tab(tab: NodeTab, name: str, phrases: list[str]) -> list[dict[str, float]]:
    rankings = tab.evaluate(RANK % (name, phrases))
    return [{row["label"]: row["probability"] for row in ranking} for ranking in rankings]


def native(bundle: Path, name: str, phrases: list[str]) -> list[dict[str, float]]:
    session = ClassificationSession.open(bundle)
    return [{p.label: p.probability for p in ranking} for ranking in session.rank(phrases, name, 10)]


def same(left: list[dict[str, float]], right: list[dict[str, float]], within: float = 1e-4) -> None:
    assert [list(each) for each in left] == [list(each) for each in right]
    for one, other in zip(left, right, strict=True):
        assert one == pytest.approx(other, abs=within)


@pytest.mark.parametrize("form", ["fp32", "fp16", "int8", "int4"])
def test_an_adapter_of_any_format_answers_as_natively(
    form: Format,
    tab: NodeTab,
    bundle: Path,
    exported: ExportedBase,
    source: Source,
    vendor: IdentityKey,
) -> None:
    write_bundle(bundle, exported, [source()], key=vendor, form=form)
    tab.open(bundle)
    same(in_tab(tab, "global", list(PHRASES)), native(bundle, "global", list(PHRASES)))


def test_the_temperature_of_an_adapter_divides_its_logits_as_natively(
    tab: NodeTab, bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey
) -> None:
    before = native(bundle, "global", list(PHRASES))
    write_bundle(bundle, exported, [replace(source(version=4), temperature=2.5)], key=vendor)
    tab.open(bundle)
    found = in_tab(tab, "global", list(PHRASES))
    same(found, native(bundle, "global", list(PHRASES)), 1e-6)
    assert all(max(one.values()) < max(other.values()) for one, other in zip(found, before, strict=True))


def test_a_base_in_int8_answers_as_natively_up_to_the_rounding_of_activations(
    tab: NodeTab, bundle: Path, exported_int8: ExportedBase, source: Source, vendor: IdentityKey
) -> None:
    write_bundle(bundle, exported_int8, [source()], key=vendor)
    tab.open(bundle)
    same(in_tab(tab, "global", list(PHRASES)), native(bundle, "global", list(PHRASES)), 0.03)


def test_an_adapter_that_was_used_before_is_used_again_without_its_files_and_the_progress_counts_the_base(
    tab: NodeTab, bundle: Path
) -> None:
    tab.open(bundle)
    seen = tab.evaluate("""(async () => {
      const seen = [];
      globalThis.engine = await opened((progress) => seen.push(progress));
      await engine.use("global");
      return seen;
    })()""")
    total = sum(path.stat().st_size for path in (bundle / "base").iterdir() if path.name != "manifest.json")
    counts = [each["received"] for each in seen if "received" in each]
    assert {each["total"] for each in seen if "received" in each} == {total}
    assert counts == sorted(counts)
    assert counts[-1] == total
    assert seen[-1] == {"starting": True}
    shutil.rmtree(bundle / "adapters")
    assert tab.evaluate("engine.use('global')")["name"] == "global"


# The page answers as the native session with an adapter of every method; what an adapter lacks is an empty tensor.
globals().update(methods.FIXTURES | virtual.FIXTURES)


def test_the_page_takes_adapters_of_every_method(
    tab: NodeTab, every_slot: Path, every_method: methods.Trained, every_method_base: Base
) -> None:
    bundle, common = every_slot / "bundle", ["--labels", every_slot / "labels", "--key", every_slot / "key.pem"]
    for name in methods.METHODS:
        made = ["bundle", "add", "--peft", every_method(name)[1], "--bundle", bundle, "--adapter", name, *common]
        made += ["--base", every_method_base.folder]
        assert CliRunner().invoke(CLI, list(map(str, made)), catch_exceptions=False).exit_code == 0
    tab.open(bundle)
    for name in methods.METHODS:
        same(in_tab(tab, name, list(PHRASES)), native(bundle, name, list(PHRASES)))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # by the builder path, by the traced path
def test_the_page_writes_with_adapters_of_every_method(
    tab: NodeTab, make_lm: Any, vendor: IdentityKey, tmp_path: Path, kind: str
) -> None:
    models = every_method_written(kind, make_lm(kind, **BASES[kind]), vendor, tmp_path)
    begin(tab, tmp_path / "lm")
    prompt = ids_of(tmp_path / "lm", PROMPT)
    for name, model in models.items():
        found = tab.evaluate(f"written({name!r}, {json.dumps({'maxTokens': 12, 'prompt': PROMPT})})")["ids"]
        expected = virtual.greedy(model, prompt, 12)
        assert found == [token for token in expected if token != 2], name


def test_the_page_writes_with_virtual_tokens_what_peft_computes(
    tab: NodeTab, virtual_bundle: Path, virtual_models: Any
) -> None:
    begin(tab, virtual_bundle)
    prompt = ids_of(virtual_bundle, PROMPT)
    for name in ("prompt", "prefix", "lora", "projected"):
        found = tab.evaluate(f"written({name!r}, {json.dumps({'maxTokens': 12, 'prompt': PROMPT})})")["ids"]
        expected = virtual.greedy(virtual_models[name][0], prompt, 12)
        assert found == [token for token in expected if token != 2], name
    both, params = "lora:0.5+p-tuning+prompt", SamplingParams(max_tokens=12)
    native = "".join(Generator.open(virtual_bundle).complete(PROMPT, params, both))
    assert tab.evaluate(f"written({both!r}, {json.dumps({'maxTokens': 12, 'prompt': PROMPT})})")["text"] == native
    for composition, about in (("prompt:0.5", "composition.weight"), ("prefix+prompt", "composition.virtual_tokens")):
        assert tab.error(f"written({composition!r}, {{ maxTokens: 9, prompt: 'a' }})")["about"] == about
    most = 64 - 5 - 1
    assert len(tab.evaluate(f"written('prompt', {{ maxTokens: 9, prompt: 'a'.repeat({most}) }})")["ids"]) == 1
    refusal = tab.error(f"written('prompt', {{ maxTokens: 9, prompt: 'a'.repeat({most + 1}) }})")
    assert (refusal["name"], refusal["about"]) == ("DataError", "prompt")
