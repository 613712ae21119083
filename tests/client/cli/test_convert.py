"""A converted adapter gives other programs the answers that a device gives."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest

from aggregation.errors import ConfigError, TrustError
from aggregation.pki.identity import IdentityKey
from client.inference.engine import GenerationEngine
from client.inference.library import Composition, Library
from client.inference.text import SamplingParams
from edgeadapt.cli.convert import convert
from edgeadapt.formats import container
from edgeadapt.formats.bundle import adapter_path
from export.bundle.write import write_bundle
from export.onnx.exported import ExportedBase
from tests.support import refused
from tests.support.bundles import flip

PROMPT = "turn on the light"
TOKENS = 12


@pytest.fixture
def int8(lm_bundle: Path, lm_exported: ExportedBase, lm_source: Any, vendor: IdentityKey) -> Path:
    """A language model with an adapter in eight bits."""
    write_bundle(lm_bundle, lm_exported, [lm_source()], key=vendor, form="int8")
    return lm_bundle


def run(bundle: Path, out: Path, *arguments: str) -> None:
    convert.main(["--bundle", str(bundle), "--out", str(out), *arguments], standalone_mode=False)


def test_onnxruntime_genai_answers_with_the_file_as_a_device_does(
    int8: Path, tmp_path: Path, engine: GenerationEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "global.onnx_adapter"
    run(int8, out, "--adapter", "global", "--json")
    row = json.loads(capsys.readouterr().out)
    assert row == {"file": str(out), "adapter": "global", "version": 3, "bytes": out.stat().st_size}

    model = og.Model(str(int8 / "base"))
    ids = [int(token) for token in og.Tokenizer(model).encode(PROMPT)]
    adapters = og.Adapters(model)
    adapters.load(str(out), "global")
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + TOKENS, do_sample=False)
    inner = og.Generator(model, params)
    inner.set_active_adapter(adapters, "global")
    inner.append_tokens(np.array(ids, np.int32))
    scores = inner.get_logits().copy()

    engine.load(Library.open(int8, None).load(Composition.of("global")))
    engine.read(ids, SamplingParams(max_tokens=TOKENS), "global")
    expected = engine._live.inner.get_logits()  # type: ignore[union-attr]
    np.testing.assert_array_equal(scores, expected)
    engine.read(ids, SamplingParams(max_tokens=TOKENS), None)
    assert np.abs(scores - engine._live.inner.get_logits()).max() > 0.01  # type: ignore[union-attr]


def test_the_file_has_the_verified_tensors_or_their_composition(lm_bundle: Path, tmp_path: Path) -> None:
    library = Library.open(lm_bundle, None)
    for name in ("anna", "global:0.5+anna"):
        run(lm_bundle, tmp_path / f"{name}.onnx_adapter", "--adapter", name)
        found = container.unpack((tmp_path / f"{name}.onnx_adapter").read_bytes())
        expected = library.load(Composition.of(name)).inputs
        assert found.keys() == expected.keys()
        for tensor, value in expected.items():
            assert found[tensor].dtype == np.float32
            np.testing.assert_array_equal(found[tensor], value)


def test_nothing_is_written_of_an_altered_adapter_or_over_another_file(lm_bundle: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    with refused(ConfigError, "kept"):
        run(lm_bundle, kept, "--adapter", "global")
    assert kept.read_text() == "kept"
    flip(lm_bundle / adapter_path("global"), 0.5)
    with refused(TrustError, "global.onnx_adapter"):
        run(lm_bundle, tmp_path / "new", "--adapter", "global")
    assert not (tmp_path / "new").exists()
