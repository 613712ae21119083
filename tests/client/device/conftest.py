"""The device's tests use the tiny bases and bundles of the exporter's tests: one exported graph for both."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from adapters.causal import build, load, tensors
from adapters.classifier import LoraSpec
from aggregation.pki.identity import IdentityKey
from export.bundle.base import ExportedBase
from export.bundle.write import AdapterSource, write_bundle
from export.causal import export_causal
from export.onnx.adapterinputs import plan
from export.onnx.quantize import Profile

_EXPORT = Path(__file__).parents[2] / "export"


def _module(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_classifier = _module(_EXPORT / "conftest.py", "tiny_base_fixtures")
for _name in ("tiny_base", "model", "exported", "exported_int8", "vendor", "household", "source", "bundle"):
    globals()[_name] = getattr(_classifier, _name)
make_lm = _module(_EXPORT / "causal" / "conftest.py", "tiny_lm_fixtures").make_lm

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ':' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)


@pytest.fixture(scope="session")
def lm_base(make_lm: Any) -> Any:
    """A language model of two layers that reads 256 tokens, one for each letter, and has a chat template."""
    base = make_lm(max_position_embeddings=256)
    settings = base.folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))
    return base


@pytest.fixture(scope="session")
def lm_model(lm_base: Any) -> Callable[[int, int], Any]:
    """Makes the torch model with an adapter: rank and seed of its values. One with rank 0 is the bare base."""

    def make(rank: int, seed: int) -> Any:
        model = build(lm_base, LoraSpec(rank=rank, alpha=2 * rank, targets=("q_proj", "v_proj")))
        rng = np.random.default_rng(seed)
        values = {n: (0.4 * rng.standard_normal(v.shape)).astype(np.float32) for n, v in tensors(model).items()}
        load(model, values)
        return model

    return make


@pytest.fixture(scope="session")
def lm_exported(lm_base: Any) -> ExportedBase:
    return export_causal(lm_base, ("q_proj", "v_proj"), Profile.FP32, max_rank=16)


@pytest.fixture(scope="session")
def lm_source(lm_model: Callable[[int, int], Any]) -> Callable[..., AdapterSource]:
    @cache
    def made(rank: int, seed: int) -> AdapterSource:
        model = lm_model(rank, seed)
        return AdapterSource("global", tensors(model), (), 3, "a" * 64, plan=plan(model))

    def make(name: str = "global", rank: int = 4, seed: int = 1, **fields: Any) -> AdapterSource:
        return replace(made(rank, seed), name=name, **fields)

    return make


@pytest.fixture
def lm_bundle(tmp_path: Path, lm_exported: ExportedBase, lm_source: Any, vendor: IdentityKey) -> Path:
    """A language model with a shared adapter of rank 4 and a private one of rank 6, both in float32."""
    sources = [lm_source(), lm_source("anna", 6, 2, parent="b" * 64)]
    write_bundle(tmp_path / "lm", lm_exported, sources, key=vendor, form="fp32")
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    return tmp_path / "lm"
