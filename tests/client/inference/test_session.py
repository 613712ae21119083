"""A session answers as the torch model does, whatever else it holds, and switches adapters without a trace."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from peft import PeftModel
from tokenizers import Tokenizer

from aggregation.errors import ConfigError, DataError, TrustError
from aggregation.pki.identity import IdentityKey
from client.inference.library import Composition, Library
from client.inference.phrases import PhraseReader
from client.inference.session import AUTO, ROUTER, SURE, ClassificationSession, Prediction
from edgeadapt.bases.classifiergraph import MAX_ROWS, group_rows, stack
from edgeadapt.formats.bundle import TOKENIZER
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.storage import WorkFolder
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.exported import ExportedBase, written
from export.parity.compare import torch_logits
from tests.support import refused
from tests.support.models import Source
from tests.support.tokenizers import TOKENIZERS

Add = Callable[[AdapterSource], None]
PHRASES = ["turn on the kitchen lights", "lock the door", "play music", "set a timer for ten minutes", "unlock"]


def test_answers_are_those_of_the_torch_model(bundle: Path, model: PeftModel, exported: ExportedBase) -> None:
    encodings = Tokenizer.from_str(exported.read(TOKENIZER).decode()).encode_batch(PHRASES)
    logits = np.concatenate([torch_logits(model, encoding.ids) for encoding in encodings])
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = ("Light", "Lock", "Music", "Timer")
    for found, row in zip(ClassificationSession.open(bundle).classify(PHRASES, "global"), expected, strict=True):
        assert found.label == labels[int(row.argmax())]
        assert found.probability == pytest.approx(row.max(), abs=0.05)


def test_the_temperature_of_an_adapter_divides_its_logits_alone_and_in_a_mixed_batch(
    bundle: Path, source: Source, add: Add
) -> None:
    for name, temperature in (("cool", 0.5), ("hot", 4.0)):
        add(replace(source(name, parent="a" * 64), temperature=temperature))
    session = ClassificationSession.open(bundle)
    rows = [(phrase, name) for phrase in PHRASES for name in ("global", "cool", "hot")]
    for (phrase, name), mixed in zip(rows, session.rank_mixed(rows, 4), strict=True):
        powers = {
            p.label: p.probability ** {"global": 1, "cool": 2, "hot": 0.25}[name]
            for p in session.rank([phrase], "global", 4)[0]
        }
        expected = {label: power / sum(powers.values()) for label, power in powers.items()}
        for ranking in (mixed, session.rank([phrase], name, 4)[0]):
            assert {p.label: p.probability for p in ranking} == pytest.approx(expected, abs=1e-6)


def test_switching_to_another_adapter_and_back_changes_no_answer(
    with_anna: Path, model: PeftModel, source: Source
) -> None:
    session = ClassificationSession.open(with_anna)
    shared = session.rank(PHRASES, "global", 4)
    assert session.rank(PHRASES, "anna", 4) != shared
    assert session.rank(PHRASES, "global", 4) == shared


@pytest.mark.parametrize("top", [0, -1])
def test_less_than_one_label_is_refused(bundle: Path, top: int) -> None:
    session = ClassificationSession.open(bundle)
    with refused(ConfigError, "top", value=top):
        session.rank(PHRASES, "global", top)
    with refused(ConfigError, "top", value=top):
        session.rank_mixed([(PHRASES[0], "global")], top)


def test_a_switch_after_the_first_use_takes_less_than_a_millisecond(with_anna: Path) -> None:
    session = ClassificationSession.open(with_anna)
    for name in ("global", "anna"):
        session.load(name)
    start = time.perf_counter()
    for _ in range(100):
        session.load("global")
        session.load("anna")
    assert (time.perf_counter() - start) / 200 < 1e-3


def test_a_call_that_fails_changes_no_later_answer(with_anna: Path) -> None:
    session = ClassificationSession.open(with_anna)
    before = session.classify(PHRASES, "global")
    (with_anna / "adapters" / "anna.onnx_adapter").write_bytes(b"")
    with pytest.raises(TrustError):
        session.classify(PHRASES, "anna")
    with pytest.raises(DataError):
        session.classify(PHRASES, "nobody")
    assert session.classify(PHRASES, "global") == before


def test_an_answer_does_not_depend_on_the_other_phrases(
    tmp_path: Path, exported_int8: ExportedBase, source: Source, vendor: IdentityKey
) -> None:
    write_bundle(tmp_path / "int8", exported_int8, [source()], key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    session = ClassificationSession.open(tmp_path / "int8")
    together = session.rank(PHRASES, "global", 4)
    assert together == [session.rank([phrase], "global", 4)[0] for phrase in PHRASES]


def test_a_ranking_is_ordered_and_sums_to_one(bundle: Path) -> None:
    (ranking,) = ClassificationSession.open(bundle).rank(PHRASES[:1], "global", 9)
    found = [prediction.probability for prediction in ranking]
    assert found == sorted(found, reverse=True)
    assert sum(found) == pytest.approx(1)


def test_a_long_text_is_truncated_at_the_models_limit(bundle: Path) -> None:
    session = ClassificationSession.open(bundle)
    words = "lock the door " * 20
    assert session.classify([words], "global") == session.classify([words + "play music"], "global")


def test_an_adapter_that_was_evicted_is_verified_again(with_anna: Path) -> None:
    session = ClassificationSession.open(with_anna, loaded=1)
    session.load("global")
    session.load("anna")
    (with_anna / "adapters" / "anna.onnx_adapter").write_bytes(b"")
    (with_anna / "adapters" / "global.onnx_adapter").write_bytes(b"")
    assert session.load("anna").name == "anna"  # from memory
    with pytest.raises(TrustError):
        session.load("global")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc/self/maps")
def test_the_weights_are_mapped_from_the_folder(bundle: Path) -> None:
    session = ClassificationSession.open(bundle)
    mapped = Path("/proc/self/maps").read_text()
    assert str(bundle / "base" / "model.onnx.data") in mapped
    assert session.classify(PHRASES, "global")


def test_an_open_session_answers_with_the_adapters_of_a_bundle_that_replaced_its_own(
    bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey
) -> None:
    session = ClassificationSession.open(bundle)
    before = session.rank(PHRASES, "global", 4)
    write_bundle(bundle, exported, [source(seed=5, version=9)], key=vendor)
    after = session.rank(PHRASES, "global", 4)
    assert before != after == ClassificationSession.open(bundle).rank(PHRASES, "global", 4)
    bundle.rename(bundle.with_name("aside"))  # as for an instant while a bundle is replaced
    assert session.rank(PHRASES, "global", 4) == after


def test_a_base_that_changes_while_it_is_loaded_is_not_used(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = ort.InferenceSession

    def tampering(*arguments: Any, **options: Any) -> ort.InferenceSession:
        (bundle / "base" / "model.onnx.data").touch()
        return load(*arguments, **options)

    monkeypatch.setattr(ort, "InferenceSession", tampering)
    with pytest.raises(TrustError):
        ClassificationSession.open(bundle)


def test_a_graph_that_takes_one_adapter_for_all_rows_answers_texts_alone_and_refuses_a_mixed_batch(
    with_anna: Path, exported: ExportedBase, source: Source, vendor: IdentityKey, tmp_path: Path
) -> None:
    expected = ClassificationSession.open(with_anna).rank(PHRASES, "global", 4)
    graph = onnx.load_model_from_string(exported.model)
    names = [value.name for value in graph.graph.input if "lora_" in value.name]
    for node in graph.graph.node:
        node.input[:] = [f"{name}/flat" if name in names else name for name in node.input]
    for name in names:  # which only leaves two dimensions as they are
        graph.graph.node.insert(0, onnx.helper.make_node("Flatten", [name], [f"{name}/flat"], f"{name}/flat"))
    work = WorkFolder(tmp_path)
    files = {name: exported.read(name) for name in exported.manifest.files} | {"model.onnx": graph.SerializeToString()}
    flat = replace(exported, work=work, manifest=replace(exported.manifest, files=written(work.path, files)))
    write_bundle(with_anna, flat, [source()], key=vendor)
    session = ClassificationSession.open(with_anna)
    assert session.rank(PHRASES, "global", 4) == expected
    with refused(DataError, "model.onnx"):
        session.rank_mixed([("unlock", "global"), ("unlock", "anna")], 1)


CHILD = """
import sys, time
from pathlib import Path
from client.inference import ClassificationSession
session = ClassificationSession.open(Path(sys.argv[1]))
print(session.classify(["lock the door"], session.library.default())[0].label)
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


# A mixed batch answers each row as it is answered alone.
LABELS = ("Light", "Lock", "Music", "Timer")
ROWS = [
    ("turn on the kitchen lights", "global"),
    ("lock the door", "anna"),
    ("unlock", "small"),
    ("set a timer for ten minutes", "anna:0.5+global"),
    ("play music", "global"),
    ("unlock", "global"),
]


def small(given: AdapterSource) -> AdapterSource:
    """Of rank 2 instead of 4, and for three labels instead of four."""
    cut = {
        name: value[:2] if "lora_A" in name else value[:, :2] if "lora_B" in name else value[:3]
        for name, value in given.tensors.items()
    }
    tensors = {name: np.ascontiguousarray(value) for name, value in cut.items()}
    return replace(given, tensors=tensors, labels=("a", "b", "c"))


@pytest.fixture(params=["fp32", "native-int8"])
def mixed(
    request: pytest.FixtureRequest, tmp_path: Path, source: Source, vendor: IdentityKey
) -> tuple[Path, ExportedBase]:
    """A bundle with three adapters of two ranks and two label sets."""
    base = request.getfixturevalue("exported" if request.param == "fp32" else "exported_int8")
    sources = [source(), source("anna", seed=7), small(source("small", seed=3))]
    write_bundle(tmp_path / "mixed", base, sources, key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    return tmp_path / "mixed", base


def loaded(bundle: Path, names: str) -> Tensors:
    return Library.open(bundle, None).load(Composition.parse(names)).inputs


def test_each_row_answers_as_it_does_alone(mixed: tuple[Path, ExportedBase]) -> None:
    session = ClassificationSession.open(mixed[0])
    together = session.rank_mixed(ROWS, 4)
    for (text, names), found in zip(ROWS, together, strict=True):
        (alone,) = session.rank([text], names, 4)
        assert [p.label for p in found] == [p.label for p in alone]
        assert [p.probability for p in found] == pytest.approx([p.probability for p in alone], abs=1e-6)


def test_rows_of_equal_length_and_rank_are_bitwise_the_same_as_alone(mixed: tuple[Path, ExportedBase]) -> None:
    session = ClassificationSession.open(mixed[0])
    rows = [("lock the door", "global"), ("lock the door", "anna"), ("open the door", "anna")]
    together = session.rank_mixed(rows, 4)
    for (text, names), found in zip(rows, together, strict=True):
        assert [found] == session.rank([text], names, 4)


def test_a_batch_without_rows_has_no_answers(mixed: tuple[Path, ExportedBase]) -> None:
    assert ClassificationSession.open(mixed[0]).rank_mixed([], 1) == []


@pytest.mark.parametrize("bad", [("", "global"), ("unlock", "nobody"), ("unlock", "../x")])
def test_one_wrong_row_refuses_the_batch(mixed: tuple[Path, ExportedBase], bad: tuple[str, str]) -> None:
    with pytest.raises((DataError, ConfigError)) as caught:
        ClassificationSession.open(mixed[0]).rank_mixed([*ROWS, bad], 1)
    assert "\n" not in str(caught.value)


def test_a_head_with_fewer_labels_is_padded_with_zeros(mixed: tuple[Path, ExportedBase]) -> None:
    bundle, base = mixed
    one, other = loaded(bundle, "global"), loaded(bundle, "anna")
    other = other | {n: v[:3] for n, v in other.items() if "classifier" in n}
    assert group_rows([one, other], base.manifest.slots) == [[0, 1]]
    for name, value in stack([one, other], base.manifest.slots).items():
        assert value.shape == (2, *one[name].shape)
        np.testing.assert_array_equal(value[0], one[name])
        kept = tuple(slice(size) for size in other[name].shape)
        np.testing.assert_array_equal(value[1][kept], other[name])
        assert np.count_nonzero(value[1]) == np.count_nonzero(other[name])


def test_rows_share_a_run_only_if_their_ranks_agree(mixed: tuple[Path, ExportedBase]) -> None:
    bundle, base = mixed
    rows = [loaded(bundle, name) for name in ("global", "small", "anna", "global", "anna+global", "small")]
    assert group_rows(rows, base.manifest.slots) == [[0, 2, 3], [1, 5], [4]]


def test_a_single_row_is_not_copied(mixed: tuple[Path, ExportedBase]) -> None:
    one = loaded(mixed[0], "global")
    for name, value in stack([one], mixed[1].manifest.slots).items():
        assert np.shares_memory(value, one[name])


def test_a_large_batch_is_split_into_runs_of_bounded_size(mixed: tuple[Path, ExportedBase]) -> None:
    session = ClassificationSession.open(mixed[0])
    rows = [("lock the door", "global"), ("play", "small")] * (MAX_ROWS + 1)
    runs = group_rows([loaded(mixed[0], name) for _, name in rows], mixed[1].manifest.slots)
    assert sorted(map(len, runs)) == [1, 1, MAX_ROWS, MAX_ROWS]
    answers = session.rank_mixed(rows, 3)
    assert answers == session.rank_mixed(rows[:2], 3) * (MAX_ROWS + 1)


def test_modules_to_save_other_than_a_head_are_shared_only_if_they_are_equal(mixed: tuple[Path, ExportedBase]) -> None:
    norm = {"norm.weight": ("32",)}
    values = [np.full(32, i, np.float32) for i in (0, 1, 0)]
    rows = [{"norm.weight": value} for value in values]
    assert group_rows(rows, norm) == [[0, 2], [1]]
    assert stack([rows[0], rows[2]], norm)["norm.weight"].shape == (32,)


# Threads that share a session get the answers of the adapters that they ask: no tenant those of another's.
TENANTS = tuple(f"tenant-{number}" for number in range(8))
TEXT = "lock the door"
ROUNDS = 60
Ask = Callable[[str], Sequence[Prediction]]


class Selecting:
    """The interface that this one replaced: one call selects an adapter, another answers."""

    def __init__(self, session: ClassificationSession) -> None:
        self.session, self.selected = session, ""

    def ask(self, tenant: str) -> list[Prediction]:
        self.selected = tenant
        self.session.load(tenant)
        return self.session.rank([TEXT], self.selected, 4)[0]


@pytest.fixture
def session(bundle: Path, source: Source, add: Callable[[AdapterSource], None]) -> ClassificationSession:
    for number, name in enumerate(TENANTS):
        add(source(name, seed=20 + number))
    return ClassificationSession.open(bundle, loaded=5)  # fewer than there are tenants: some are always loaded anew


def wrong_answers(ask: Ask, expected: dict[str, list[Prediction]]) -> int:
    """Eight threads at once, each for one tenant; the number of answers that are another tenant's."""
    barrier = Barrier(len(TENANTS))

    def work(tenant: str) -> int:
        barrier.wait()
        return sum(ask(tenant) != expected[tenant] for _ in range(ROUNDS))

    with ThreadPoolExecutor(len(TENANTS)) as pool:
        return sum(pool.map(work, TENANTS))


def test_no_thread_gets_the_answer_of_another_tenants_adapter(session: ClassificationSession) -> None:
    expected = {tenant: session.rank([TEXT], tenant, 4)[0] for tenant in TENANTS}
    assert len({answer[0].probability for answer in expected.values()}) == len(TENANTS)
    assert wrong_answers(Selecting(session).ask, expected) > 0
    assert wrong_answers(lambda tenant: session.rank([TEXT], tenant, 4)[0], expected) == 0
    assert wrong_answers(lambda tenant: session.rank_mixed([(TEXT, tenant)], 4)[0], expected) == 0


# Which phrases say something to a classifier.
def reader(kind: str) -> PhraseReader:
    return PhraseReader.of(TOKENIZERS[kind]().to_str().encode())


@pytest.mark.parametrize(
    ("kind", "text", "share"),
    [
        ("wordpiece", "turn on", 0),
        ("wordpiece", "🎵 turn on", 1 / 3),
        ("wordpiece", "１２３", 1),
        ("wordpiece", "\u200b", 1),
        ("wordpiece", "[SEP] [MASK]", 1),
        ("wordpiece", "[UNK] turn", 1 / 2),
        ("unigram", "𒀀 turn", 1 / 2),
        ("unigram", "𒀀 🎵", 1),
        ("unigram", "▁ ▁", 1),
        ("unigram", "<s> </s>", 1),
        ("unigram", "<s> turn", 0),
        ("byte-level", "turn", 0),
        ("byte-level", "🎵", 1),
        ("byte-level", "Ġ <s>", 1),
    ],
)
def test_special_tokens_and_white_space_do_not_count_as_known(kind: str, text: str, share: float) -> None:
    assert reader(kind).unknown_share(text) == pytest.approx(share)
    if share == 1:
        with refused(DataError, "text.tokens"):
            reader(kind).tokens(text)
    else:
        assert reader(kind).tokens(text)


# A router chooses the adapter for each text.


def router(given: AdapterSource, rows: Any) -> AdapterSource:
    """An adapter that changes nothing but the head, whose rows stand for the names of adapters."""
    names = ("anna", "global", "elsewhere", "none")
    head = {name: rows if name.endswith("classifier.weight") else 0 * value for name, value in given.tensors.items()}
    return replace(given, tensors=head, labels=names)


@pytest.fixture
def routed(with_anna: Path, source: Source, add: Add) -> Path:
    """A bundle whose router names "anna" for the first of ``PHRASES``, "global" for the second, and for the third an
    adapter that the bundle does not have."""
    meaning = ClassificationSession.open(with_anna).embed(PHRASES[:3])
    rows = np.vstack([meaning - meaning.mean(axis=0), np.zeros_like(meaning[:1])]) * np.float32(1000)
    add(router(source("router"), rows))
    return with_anna


def test_each_text_is_answered_by_the_adapter_that_the_router_names(routed: Path) -> None:
    session = ClassificationSession.open(routed)
    chosen = [session.answer(text, AUTO, 4)[:2] for text in PHRASES[:3]]
    assert [adapter.name for adapter, _ in chosen] == ["anna", "global", "anna"]  # the private one is the default
    for text, (adapter, ranking) in zip(PHRASES[:3], chosen, strict=True):
        assert ranking == session.ranking(text, adapter.name, 4)


def test_where_the_router_is_unsure_or_withheld_the_default_adapter_answers(
    routed: Path, source: Source, add: Add
) -> None:
    session = ClassificationSession.open(routed)
    assert session.answer("", AUTO, 1)[0].name == "anna"
    assert session.answer(PHRASES[1], AUTO, 1)[0].name == "global"
    policy = session.policy
    session.policy = policy.model_copy(update={"deny": ("global",)})
    assert session.answer(PHRASES[1], AUTO, 1)[0].name == "anna"
    session.policy = policy
    hidden = session.embed(PHRASES[:1]).shape[1]
    add(router(source("router", version=4), np.zeros((4, hidden), np.float32)))
    assert session.ranking(PHRASES[1], ROUTER, 1).predictions[0].probability < SURE
    assert session.answer(PHRASES[1], AUTO, 1)[0].name == "anna"


def test_without_a_router_no_adapter_is_chosen(with_anna: Path) -> None:
    with refused(DataError, "router.json", "anna"):
        ClassificationSession.open(with_anna).answer("unlock", AUTO, 1)
