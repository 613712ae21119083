"""The page answers as the native session with an adapter of every method; what an adapter lacks is an empty tensor."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from aggregation.pki.identity import IdentityKey
from client.inference.generate import Generator
from client.inference.text import SamplingParams
from edgeadapt.bases.base import Base
from tests.browser.test_classification import PHRASES, in_tab, native, same
from tests.browser.test_generation import PROMPT, begin, ids_of
from tests.export.causal.test_vectors import BASES, every_method_written
from tests.support import methods, virtual
from tests.support.nodetab import NodeTab
from tests.support.recipes import CLI

pytestmark = pytest.mark.slow
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
