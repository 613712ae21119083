import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from tokenizers import Tokenizer

from aggregation.errors import ConfigError, DataError, TrustError
from aggregation.pki.identity import IdentityKey
from client.inference import session as session_module
from client.inference.compose import parse
from client.inference.session import ClassificationSession
from client.inference.text import MAX_TEXT
from export.bundle.base import ExportedBase
from export.bundle.write import AdapterSource, add_adapter, write_bundle
from export.parity.compare import torch_logits

Source = Callable[..., AdapterSource]
PHRASES = ["turn on the kitchen lights", "lock the door", "play music", "set a timer for ten minutes", "unlock"]


@pytest.fixture
def with_anna(bundle: Path, exported: ExportedBase, source: Source, household: IdentityKey) -> Path:
    add_adapter(bundle, exported.plan, source("anna", seed=7, parent="a" * 64), key=household)
    return bundle


def opened(bundle: Path, name: str = "global") -> ClassificationSession:
    session = ClassificationSession.open(bundle)
    session.use(name)
    return session


def test_answers_are_those_of_the_torch_model(bundle: Path, model: PeftModel, exported: ExportedBase) -> None:
    encodings = Tokenizer.from_str(exported.tokenizer.decode()).encode_batch(PHRASES)
    logits = np.concatenate([torch_logits(model, encoding.ids) for encoding in encodings])
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = ("Light", "Lock", "Music", "Timer")
    for found, row in zip(opened(bundle).classify(PHRASES), expected, strict=True):
        assert found.label == labels[int(row.argmax())]
        assert found.probability == pytest.approx(row.max(), abs=0.05)


def test_each_adapter_gives_its_own_answers_and_comes_back_unchanged(
    with_anna: Path, model: PeftModel, source: Source
) -> None:
    session = opened(with_anna)
    shared = session.rank(PHRASES, 4)
    session.use("anna")
    assert session.rank(PHRASES, 4) != shared
    session.use("global")
    assert session.rank(PHRASES, 4) == shared


@pytest.mark.parametrize("top", [0, -1])
def test_less_than_one_label_is_refused(bundle: Path, top: int) -> None:
    session = opened(bundle)
    with pytest.raises(ConfigError, match="1 or more"):
        session.rank(PHRASES, top)
    with pytest.raises(ConfigError, match="1 or more"):
        session.rank_rows([(PHRASES[0], "global")], top)


def test_a_switch_after_the_first_use_takes_less_than_a_millisecond(with_anna: Path) -> None:
    session = opened(with_anna)
    session.use("anna")
    start = time.perf_counter()
    for _ in range(100):
        session.use("global")
        session.use("anna")
    assert (time.perf_counter() - start) / 200 < 1e-3


def test_a_failed_switch_leaves_the_running_adapter_in_place(with_anna: Path) -> None:
    session = opened(with_anna)
    before = session.classify(PHRASES)
    (with_anna / "adapters" / "anna.onnx_adapter").write_bytes(b"")
    with pytest.raises(TrustError, match="not the file that was signed"):
        session.use("anna")
    with pytest.raises(DataError, match="no sidecar"):
        session.use("nobody")
    assert session.adapter is not None
    assert session.adapter.name == "global"
    assert session.classify(PHRASES) == before


def test_an_answer_does_not_depend_on_the_other_phrases(
    tmp_path: Path, exported_int8: ExportedBase, source: Source, vendor: IdentityKey
) -> None:
    write_bundle(tmp_path / "int8", exported_int8, [source()], key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    session = opened(tmp_path / "int8")
    together = session.rank(PHRASES, 4)
    assert together == [session.rank([phrase], 4)[0] for phrase in PHRASES]


def test_a_ranking_is_ordered_and_sums_to_one(bundle: Path) -> None:
    (ranking,) = opened(bundle).rank(PHRASES[:1], 9)
    found = [prediction.probability for prediction in ranking]
    assert found == sorted(found, reverse=True)
    assert sum(found) == pytest.approx(1)


@pytest.mark.parametrize("text", ["", "  \n", "\u200b"])
def test_an_empty_text_is_refused(bundle: Path, text: str) -> None:
    with pytest.raises(DataError, match="give a phrase"):
        opened(bundle).classify([text])


def test_a_long_text_is_cut_off_at_the_models_limit(bundle: Path) -> None:
    session = opened(bundle)
    words = "lock the door " * 20
    assert session.classify([words]) == session.classify([words + "play music"])


def test_a_text_beyond_any_phrase_is_refused(bundle: Path) -> None:
    with pytest.raises(DataError, match="above the limit"):
        opened(bundle).classify(["a" * (MAX_TEXT + 1)])


def test_a_text_that_is_no_unicode_is_refused(bundle: Path) -> None:
    with pytest.raises(DataError, match="UTF-8"):
        opened(bundle).classify(["lock \udcff"])


def test_no_adapter_in_use_is_said(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter is in use"):
        ClassificationSession.open(bundle).classify(PHRASES)


def test_no_bundle_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no bundle at"):
        ClassificationSession.open(tmp_path / "nowhere")


def test_the_private_adapter_is_the_default_else_the_shared_one(
    bundle: Path, exported: ExportedBase, source: Source, household: IdentityKey
) -> None:
    assert ClassificationSession.open(bundle).default() == "global"
    add_adapter(bundle, exported.plan, source("anna", parent="a" * 64), key=household)
    assert ClassificationSession.open(bundle).default() == "anna"
    add_adapter(bundle, exported.plan, source("bert", parent="a" * 64), key=household)
    with pytest.raises(ConfigError, match="choose with --adapter: anna, bert"):
        ClassificationSession.open(bundle).default()


def test_adapters_that_were_not_used_for_long_are_given_up(with_anna: Path) -> None:
    session = ClassificationSession.open(with_anna, loaded=1)
    session.use("global")
    session.use("anna")
    assert parse("anna") in session._loaded
    assert parse("global") not in session._loaded
    assert session.use("global").name == "global"


def test_adapters_of_different_rank_and_labels_run_in_one_session(
    bundle: Path, exported: ExportedBase, source: Source, household: IdentityKey
) -> None:
    given = source("small", seed=3)
    cut = {
        name: value[:2] if "lora_A" in name else value[:, :2] if "lora_B" in name else value[:3]
        for name, value in given.tensors.items()
    }
    cut = {name: np.ascontiguousarray(value) for name, value in cut.items()}
    add_adapter(bundle, exported.plan, replace(given, tensors=cut, labels=("a", "b", "c")), key=household)
    session = opened(bundle)
    assert session.use("small").rank == 2
    assert {prediction.label for prediction in session.rank(PHRASES[:1], 9)[0]} == {"a", "b", "c"}


@pytest.mark.skipif(sys.platform != "linux", reason="the list of what is mapped is Linux's")
def test_the_weights_are_mapped_from_the_folder_and_not_read(bundle: Path) -> None:
    session = opened(bundle)
    mapped = Path("/proc/self/maps").read_text()
    assert str(bundle / "base" / "model.onnx.data") in mapped
    assert session.classify(PHRASES)


def test_a_bundle_that_is_replaced_while_a_session_runs_changes_none_of_its_answers(
    bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey
) -> None:
    session = opened(bundle)
    before = session.rank(PHRASES, 4)
    write_bundle(bundle, exported, [source(seed=5, version=9)], key=vendor)
    assert session.rank(PHRASES, 4) == before
    assert opened(bundle).rank(PHRASES, 4) != before


def test_a_base_that_changed_while_it_was_loaded_is_not_used(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = session_module._declared

    def tampering(session: Any) -> int:
        (bundle / "base" / "model.onnx.data").touch()
        return kept(session)

    monkeypatch.setattr(session_module, "_declared", tampering)
    with pytest.raises(TrustError, match="changed while it was being loaded"):
        ClassificationSession.open(bundle)


def test_a_graph_that_takes_one_adapter_a_batch_says_so(bundle: Path) -> None:
    session = opened(bundle)
    session._dimensions = 2
    with pytest.raises(ConfigError, match="one adapter for a whole batch"):
        session.rank_rows([("unlock", "global")], 1)


def test_a_graph_that_wants_a_leading_dimension_gets_it_for_one_adapter_too(bundle: Path) -> None:
    session = opened(bundle)
    before = session.rank(PHRASES, 4)
    other = ClassificationSession.open(bundle)
    other._dimensions = 3
    other.use("global")
    for one, found in zip(before, other.rank(PHRASES, 4), strict=True):
        assert [p.probability for p in found] == pytest.approx([p.probability for p in one], abs=1e-6)


CHILD = """
import sys, time
from pathlib import Path
from client.inference import session as session_module
from client.inference.compose import parse
from client.inference.session import ClassificationSession
session = ClassificationSession.open(Path(sys.argv[1]))
session.use(session.default())
print(session.classify(["lock the door"])[0].label)
heavy = {"torch", "flwr", "transformers", "peft", "onnx", "safetensors", "sqlalchemy"}
print(sorted(heavy & set(sys.modules)))
print(time.process_time())
"""


def test_an_inference_only_device_imports_no_framework_and_starts_in_about_a_second(bundle: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, str(bundle)], capture_output=True, text=True, check=True)
    label, heavy, seconds = done.stdout.splitlines()
    assert label in ("Light", "Lock", "Music", "Timer")
    assert heavy == "[]"
    assert float(seconds) < 3  # CPU seconds; about half a second is seen
