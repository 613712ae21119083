"""The page on WebGPU, which Chromium emulates here: the answers of the native session."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from aggregation.pki.identity import IdentityKey
from edgeadapt.bases.base import Base
from edgeadapt.formats.manifest import Format
from export.bundle.write import write_bundle
from export.onnx.classifier import export_classifier
from export.onnx.exported import Profile
from tests.browser.test_classification import PHRASES, native, same
from tests.browser.test_generation import greedy, ids_of
from tests.browser.test_page import ask, shown
from tests.support.exhaustive import few
from tests.support.models import Source, slotted_of

pytestmark = pytest.mark.slow

EMULATED = "WebGPU (google swiftshader)"
RUNS_ON = (
    "[...document.querySelectorAll('#facts dt')].find((term) => term.textContent === 'Runs on').nextSibling.textContent"
)
WRITE = """(async (prompts) => {
  const load = (name) => import(`/${name}.js`);
  const [{ HttpSource }, { MODEL, Trust }] = await Promise.all([load("sources"), load("trust")]);
  const { readerOf } = await load("text");
  const [runtime, { Generation, cacheOutputs }] = await Promise.all([load("runtime"), load("generate")]);
  const here = new URL("/", location.href);
  const source = new HttpSource(new URL("bundle/", here), new URL("bundle.json", here));
  const trust = await Trust.open(await (await fetch("/trust.pem")).text());
  const { manifest, files } = await trust.base(source, () => {});
  const session = await runtime.open(files, MODEL, { gpu: true, kept: cacheOutputs(files) });
  const text = readerOf(files.get("tokenizer.json"), files.get("tokenizer_config.json"));
  const generation = new Generation(session, text, files);
  const feeds = runtime.adapterFeeds((await trust.adapter(source, manifest, "global")).inputs);
  const found = [];
  for (const prompt of prompts) {
    const ids = [];
    const given = { asked: prompt, maxTokens: 4 };
    for await (const { id } of generation.pieces(generation.promptIds(prompt), feeds, given)) ids.push(id);
    found.push({ ids, reused: generation.last.reused });
  }
  generation.close();
  await session.release();
  return found;
})"""
CHOOSE = """(async ({ gpu, provider, adapter }) => {
  const { choose } = await import('/runtime.js');
  const released = [];
  const info = { vendor: 'acme', architecture: 'x1', isFallbackAdapter: false, ...adapter };
  Object.defineProperty(navigator, 'gpu', {
    configurable: true,
    value: { requestAdapter: async () => (adapter === null ? null : { info }) },
  });
  let now = 0;
  performance.now = () => now;
  const opened = (name, numbers, milliseconds) => ({
    session: { release: async () => released.push(name) },
    probe: async () => {
      now += milliseconds;
      return [Float32Array.from(numbers, (number) => number ?? NaN)];
    },
  });
  const open = async (onGpu) => {
    if (onGpu && gpu.fails) throw new RangeError('out of memory\\nat a place');
    return onGpu ? opened('gpu', gpu.numbers, gpu.milliseconds) : opened('wasm', [1, -20, 3], 100);
  };
  const { runsOn } = await choose(open, provider ?? undefined);
  return { runsOn: runsOn.replace(/, [0-9]+ threads?/, ''), released };
})"""


def test_webgpu_is_chosen_where_it_gives_the_same_numbers_sooner(
    page: Any, serve: Callable[[Path], str], bundle: Path
) -> None:
    page.goto(serve(bundle))
    same_numbers, nothing = [1.001, -20, 3], None
    for gpu, adapter, runs_on, released in (
        ({"numbers": same_numbers, "milliseconds": 0}, {}, "WebGPU (acme x1)", ["wasm"]),
        ({"numbers": same_numbers, "milliseconds": 1000}, {}, "WebAssembly (WebGPU is slower)", ["gpu"]),
        ({"numbers": [1.1, -20, 3], "milliseconds": 0}, {}, "WebAssembly (WebGPU gives other numbers)", ["gpu"]),
        ({"numbers": [nothing, -20, 3], "milliseconds": 0}, {}, "WebAssembly (WebGPU gives other numbers)", ["gpu"]),
        ({"fails": True}, {}, "WebAssembly (out of memory)", []),
        ({}, {"isFallbackAdapter": True}, "WebAssembly (WebGPU is emulated here)", []),
        ({}, None, "WebAssembly (no WebGPU)", []),
    ):
        given = json.dumps({"gpu": gpu, "adapter": adapter})
        assert page.evaluate(f"{CHOOSE}({given})") == {"runsOn": runs_on, "released": released}
    for gpu, adapter, provider, message in (
        ({"numbers": [1.1, -20, 3], "milliseconds": 0}, {}, "webgpu", "WebGPU gives other numbers"),
        ({}, None, "webgpu", "no WebGPU"),
        ({}, {}, "cuda", "the provider is wasm or webgpu"),
    ):
        given = json.dumps({"gpu": gpu, "adapter": adapter, "provider": provider})
        failed = page.error(f"{CHOOSE}({given})")
        assert (failed["name"], failed["about"]) == ("ConfigError", "provider")
        assert message in failed["message"]


def test_an_emulated_webgpu_is_used_only_when_the_address_asks_for_it(
    page: Any, serve: Callable[[Path], str], bundle: Path
) -> None:
    url = serve(bundle)
    page.goto(url)
    assert page.evaluate(RUNS_ON).endswith("(WebGPU is emulated here)")
    page.goto(f"{url}?provider=wasm")
    assert "(" not in page.evaluate(RUNS_ON)
    page.goto(f"{url}?provider=cuda")
    assert page.state() == "bad"
    assert page.status() == "the provider is wasm or webgpu"


@pytest.mark.parametrize("profile", few([Profile.FP32, Profile.NATIVE_INT8], Profile.FP32), ids=str)
def test_a_classifier_answers_as_natively_on_webgpu(
    page: Any,
    serve: Callable[[Path], str],
    bundle: Path,
    model: PeftModel,
    tiny_base: Base,
    source: Source,
    vendor: IdentityKey,
    profile: Profile,
) -> None:
    form: Format = "fp32" if profile is Profile.FP32 else "int8"
    write_bundle(bundle, export_classifier(slotted_of(model), tiny_base, profile), [source()], key=vendor, form=form)
    page.goto(f"{serve(bundle)}?provider=webgpu")
    assert page.evaluate(RUNS_ON) == EMULATED
    answers = []
    phrases = list(PHRASES[:3])  # the emulation compiles the graph for each length
    for phrase in phrases:
        ask(page, phrase)
        answers.append(dict(shown(page)))
    same(answers, native(bundle, "global", phrases), 1e-4 if profile is Profile.FP32 else 0.03)


def test_a_language_model_with_its_cache_on_webgpu_writes_as_natively(
    page: Any, serve: Callable[[Path], str], lm_bundle: Path
) -> None:
    """At most 33 tokens: over more, the attention of SwiftShader gives other numbers, and the page refuses it."""
    prompts = ["hello there", "hello you", "hello you"]
    page.goto(serve(lm_bundle))
    found = page.evaluate(f"{WRITE}({json.dumps(prompts)})")
    assert [one["ids"] for one in found] == [
        greedy(lm_bundle, "global", ids_of(lm_bundle, prompt), 4) for prompt in prompts
    ]
    assert [one["reused"] for one in found] == [0, len("hello "), len("hello yo")], "the rest of the cache was cut off"
