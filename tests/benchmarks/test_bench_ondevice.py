"""`python -m benchmarks ondevice` on a tiny Llama: its figures, goals, tables, processes, and the peer's adapter."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file

from aggregation.errors import DataError
from aggregation.pki.identity import IdentityKey
from benchmarks.__main__ import bench
from benchmarks.ondevice import compare, inputs, memory, report, sharing
from benchmarks.ondevice.compare import race
from benchmarks.ondevice.eager import TorchEngine
from benchmarks.ondevice.inputs import TokenWindows
from benchmarks.ondevice.process import PEER, TORCH, Completion, Contender, ContenderSpec, loss
from benchmarks.ondevice.profile import operators
from client.inference.library import Library
from edgeadapt.bases.base import Base
from edgeadapt.bases.states import LowerLayers
from edgeadapt.formats.bundle import UPPER
from edgeadapt.methods import causal
from export.bundle.write import write_bundle
from export.onnx.exported import ExportedBase, Profile
from tests.support import models, refused

globals().update(models.FIXTURES)

VOCABULARY = len(models.LETTERS)
HEADS, KV_HEADS = 4, 2
RECIPE = inputs.Recipe(rank=4, alpha=8, steps=2, windows=2, rate=0.05)
WORK = compare.OnDeviceWorkload(
    rounds=2, prompt=12, tokens=6, eager=2, windows=1, threads=1, starts=1, tenants=(1, 3), recipe=RECIPE
)
needs_peer = pytest.mark.skipif(not compare.has_peer(), reason="llama.cpp is not installed: pip install '.[bench]'")


@pytest.fixture(scope="module")
def tiny(make_lm: models.MakeLm) -> Base:
    return make_lm(intermediate_size=128, max_position_embeddings=128)


@pytest.fixture(scope="module")
def text() -> TokenWindows:
    rng = np.random.default_rng(3)
    return TokenWindows(rng.integers(3, VOCABULARY, (4, 64)), rng.integers(3, VOCABULARY, (2, 64)))


@pytest.fixture(scope="module")
def gguf(tiny: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base as the peer reads it, in float32."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    _write_base(path, load_file(tiny.folder / "model.safetensors"))
    return path


@pytest.fixture(scope="module")
def adapter(tiny: Base, text: TokenWindows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEADAPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return inputs.trained(tiny, RECIPE, text.train, lambda: None)


def _write_base(path: Path, tensors: dict[str, np.ndarray]) -> None:
    gguf = pytest.importorskip("gguf")
    from benchmarks.ondevice.ggufadapter import rotary_order

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    names = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, value in tensors.items():
        if name.startswith("model.layers."):
            number, module = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(module)
            value = rotary_order(value, heads) if heads else value
            name = f"blk.{number}.{names[module]}.weight"
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        writer.add_tensor(name, np.ascontiguousarray(value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def found(
    tiny: Base, text: TokenWindows, gguf: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A run on the tiny base, with llama.cpp if it is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEADAPT_CACHE", str(adapter.parents[1]))
        steps: list[str] = []
        folder = tmp_path_factory.mktemp("files")
        result = compare.on_base(tiny, gguf, text, [Profile.FP32], WORK, folder, steps.append)
    assert {"export: fp32", "cold start 1 of 1: fp32", "perplexity: torch, base", "round 2 of 2: fp32"} <= set(steps)
    return json.loads(json.dumps(result))  # type: ignore[no-any-return]


def test_the_json_has_the_documented_keys_for_every_contender(found: dict[str, Any]) -> None:
    names = {"fp32", TORCH, *([PEER] if compare.has_peer() else [])}
    for what in ("decode", "prefill"):
        assert set(found[what]) == names
        assert all(set(speeds) == {"base", "adapter"} and min(speeds.values()) > 0 for speeds in found[what].values())
    assert set(found["swap_ms"]) == set(found["perplexity"]) == set(found["cold_start_s"]) == names
    assert set(found["sizes"]["fp32"]) == {"base", "int8", "fp32", "fp16", "int4"}
    if sys.platform == "linux":
        assert (found["tenants"]["profile"], list(found["tenants"]["tenants"])) == ("fp32", ["1", "3"])
    assert found["sizes"]["fp32"]["int8"] < found["sizes"]["fp32"]["fp16"] < found["sizes"]["fp32"]["fp32"]


def test_ours_has_the_perplexity_of_torch_with_and_without_the_adapter(found: dict[str, Any]) -> None:
    torchs, ours = found["perplexity"][TORCH], found["perplexity"]["fp32"]
    assert torchs["fp32"] != pytest.approx(torchs["base"], rel=1e-3)  # the adapter changes it
    assert ours["base"] == pytest.approx(torchs["base"], rel=1e-4)
    assert ours["fp32"] == pytest.approx(torchs["fp32"], rel=1e-4)
    assert ours["int8"] == pytest.approx(torchs["fp32"], rel=1e-2)


@needs_peer
def test_the_peer_runs_the_same_base_and_the_same_adapter(found: dict[str, Any]) -> None:
    torchs, peers = found["perplexity"][TORCH], found["perplexity"][PEER]
    assert peers["base"] == pytest.approx(torchs["base"], rel=1e-3)
    assert peers["fp32"] == pytest.approx(torchs["fp32"], rel=1e-3)


@needs_peer
def test_the_peer_needs_the_rows_of_its_adapter_in_its_own_order(
    tiny: Base, text: TokenWindows, gguf: Path, adapter: Path, tmp_path: Path
) -> None:
    from benchmarks.ondevice.ggufadapter import write_gguf
    from benchmarks.ondevice.peer import LlamaCppEngine

    tensors = {name: 8 * value for name, value in load_file(adapter).items() if ".lora_B." in name}
    tensors = load_file(adapter) | tensors
    write_gguf(tmp_path / "right.gguf", tensors, alpha=RECIPE.alpha, heads=HEADS, kv_heads=KV_HEADS)
    write_gguf(tmp_path / "wrong.gguf", tensors, alpha=RECIPE.alpha, heads=1, kv_heads=1)
    files = [tmp_path / "right.gguf", tmp_path / "wrong.gguf"]
    peer, ids = LlamaCppEngine(gguf, threads=1, context=64, adapters=files), text.test[0, :32].tolist()
    model = causal.build(tiny, RECIPE.lora)
    causal.load(model, tensors)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    peer.use(0)
    np.testing.assert_allclose(peer.logits(ids), expected, atol=0.03)  # the peer's cache is in half precision
    peer.use(1)
    assert np.abs(peer.logits(ids) - expected).max() > 0.3


@needs_peer
def test_the_peer_continues_a_prompt_as_torch_does(tiny: Base, text: TokenWindows, gguf: Path) -> None:
    from benchmarks.ondevice.peer import LlamaCppEngine

    peer, torchs = (
        LlamaCppEngine(gguf, threads=1, context=32),
        TorchEngine(str(tiny.folder), threads=1, lora=RECIPE.lora),
    )
    completions = []
    for engine in (peer, torchs):
        engine.prefill(text.prompt(16))
        completions.append([engine.step() for _ in range(8)])
    assert completions[0] == completions[1]


def test_training_again_uses_the_cached_adapter_and_another_recipe_makes_another(
    tiny: Base, text: TokenWindows, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEADAPT_CACHE", str(adapter.parents[1]))
    steps: list[int] = []
    assert inputs.trained(tiny, RECIPE, text.train, lambda: steps.append(1)) == adapter
    assert not steps
    other = inputs.Recipe(rank=4, alpha=8, steps=1, windows=2)
    assert inputs.trained(tiny, other, text.train, lambda: steps.append(1)) != adapter
    assert len(steps) == 1


def test_the_loss_is_the_cross_entropy_of_torch() -> None:
    scores = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)

    class Fixed:
        def logits(self, tokens: Any) -> Any:
            return scores

    row = [0, 3, 6, 2, 1]
    total, count = loss(Fixed(), [row])  # type: ignore[arg-type]
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(scores[:-1]), torch.tensor(row[1:]), reduction="sum")
    assert (count, total) == (4, pytest.approx(float(expected), rel=1e-6))


class FakeContender:
    """A contender that reports times without running."""

    def __init__(self, name: str, log: list[tuple[str, int | None]]) -> None:
        self.spec, self.log = ContenderSpec(name, "", (), 3, 1, 8, 1, 1, ()), log

    def use(self, adapter: int | None) -> float:
        self.log.append((self.spec.name, adapter))
        return 0.5

    def complete(self, prompt: Any, count: int) -> Completion:
        return Completion(0.5, [0.1, 9.0, 0.1], [7] * count)


def test_the_order_changes_every_round_and_the_first_round_only_warms_up() -> None:
    log: list[tuple[str, int | None]] = []
    fakes: Any = [FakeContender("a", log), FakeContender("b", log)]
    steps: list[str] = []
    results = race(fakes, [1, 2], 2, steps.append)
    assert steps[:3] == ["warm-up: a", "warm-up: b", "round 1 of 2: b"]
    assert [name for name, _ in log] == ["a", "a", "b", "b", "b", "b", "a", "a", "a", "a", "b", "b"]
    assert [arm for _, arm in log[:6]] == [0, None, 0, None, None, 0]
    assert results["a"].decode.base == [10, 10]  # of the median token: the one of nine seconds does not count
    assert results["a"].prefill.adapter == [4, 4]
    assert results["a"].swap == [0.5, 0.5]


PAGES = {"rss": 105 * 10**6, "shared": 40 * 10**6, "private": 65 * 10**6}


def _result(
    decode: dict[str, float], *, perplexity: float = 20.0, size: int = 100, memory: float = 1e8, start: float = 0.5
) -> dict[str, Any]:
    """A run of two profiles against a peer with 100 tokens per second, perplexity 20 and 100 bytes."""
    names = {"native-int4": decode["native-int4"], "native-int8": decode["native-int8"], PEER: 100.0, TORCH: 5.0}
    speeds = {name: {"base": speed, "adapter": speed} for name, speed in names.items()}
    to_peer = {name: {"base": speed / 100, "adapter": speed / 100} for name, speed in names.items()}
    forms = dict.fromkeys(("int8", "fp32", "fp16", "int4"), 20.0)
    perplexities = {"native-int4": forms | {"int8": perplexity}, "native-int8": forms}
    bytes_of = {"int8": 25, "fp32": 100, "fp16": 50, "int4": 15}
    each = dict.fromkeys(names, 0.5)
    found: dict[str, Any] = {
        "rounds": 1, "threads": 2, "prompt_tokens": 8, "generated_tokens": 8, "load_average": [1.0, 2.0],
        "sizes": {"native-int4": {"base": size} | bytes_of, "native-int8": {"base": 150} | bytes_of,
                  PEER: {"base": 100, "fp32": 100}},
        "perplexity": perplexities | {PEER: {"base": 40.0, "fp32": 20.0}, TORCH: {"base": 40.0, "fp32": 20.0}},
        "swap_ms": each, "cold_start_s": each, "cold_start_s_spread": {name: [0.4, 0.6] for name in names},
        "cold_adapter_ms": each, "minilm_ms": {"ms": 3.0},
        "swap_ms_spread": {name: [0.4, 0.6] for name in names}, "peak_memory_bytes": dict.fromkeys(names, 10**8),
        "tenants": {
            "profile": "native-int4", "tenants": {"1": PAGES, "100": PAGES | {"rss": 303 * 10**6}},
            "bytes_per_tenant": 2 * 10**6, "adapter_bytes": 1_900_000,
        },
    }  # fmt: skip
    found["peak_memory_bytes"] |= {"native-int4": memory}
    found["cold_start_s"] = each | {"native-int4": start}
    for what in ("decode", "prefill"):
        found |= {what: speeds, f"{what}_ratio": to_peer, f"{what}_cost": dict.fromkeys(names, 0.01)}
        found[f"{what}_ratio_quartiles"] = {
            name: {arm: (0.99 * value, 1.01 * value) for arm, value in arms.items()} for name, arms in to_peer.items()
        }
        found[f"{what}_spread"] = {name: {"base": [1.0, 9.0], "adapter": [1.0, 9.0]} for name in names}
    return found


def test_the_profile_of_the_goals_is_the_fastest_that_is_comparable_to_the_peer() -> None:
    fast = {"native-int4": 120.0, "native-int8": 130.0}
    assert report.chosen(_result(fast)) == "native-int4"  # the other has 1.5 times the bytes
    assert report.chosen(_result(fast, perplexity=21.0)) == "native-int8"  # none is comparable


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, None),
        ({"perplexity": 20.5}, "perplexity with adapter / llama.cpp"),
        ({"size": 120}, "bytes of the base / llama.cpp"),
        ({"decode": {"native-int4": 121.0, "native-int8": 50.0}}, "decode / llama.cpp, lower quartile"),
        ({"memory": 1.3e8}, "peak memory / llama.cpp"),
        ({"start": 0.6}, "cold start / llama.cpp"),
    ],
    ids=["none", "perplexity", "bytes", "decode", "memory", "start"],
)
def test_a_missed_goal_is_reported_as_not_reached(change: dict[str, Any], missed: str | None) -> None:
    result = _result(**({"decode": {"native-int4": 125.0, "native-int8": 50.0}} | change))
    rows = {row["goal"]: row["reached"] for row in report.judged(result)["goals"]}
    assert rows.get(missed or "", False) is False
    assert all(rows.values()) is (missed is None)
    assert ("not reached" in report.table(report.judged(result))) is (missed is not None)


def test_without_a_peer_the_goals_relative_to_it_are_left_out() -> None:
    result = _result({"native-int4": 125.0, "native-int8": 50.0})
    for key, values in result.items():
        if isinstance(values, dict):
            values.pop(PEER, None)
        if key.endswith("_ratio"):
            result[key] = {}
    judged = report.judged(result)
    assert not [row for row in judged["goals"] if "llama.cpp" in row["goal"]]
    assert "/ peer" not in report.table(judged)


def test_a_contender_shows_no_warnings_and_ends_at_an_interrupt(
    tiny: Base, adapter: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = ContenderSpec(TORCH, str(tiny.folder), (str(adapter),), 1, 1, 16, RECIPE.rank, RECIPE.alpha, RECIPE.targets)

    def interrupted() -> None:
        with Contender(spec, [1, 2]) as contender:
            processes.append(contender.process)
            raise KeyboardInterrupt

    processes: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert processes[0].returncode == -signal.SIGKILL
    assert capfd.readouterr().err == ""  # none of its libraries' warnings


def test_one_text_under_several_adapters_is_timed_in_every_way_and_answered_alike(tiny_base: Base) -> None:
    work = sharing.SharingWorkload(layers=1, adapters=(1, 3), repeats=2, profile=Profile.FP32)
    found = sharing.measure(tiny_base, work, lambda _: None)
    assert list(found["adapters"]) == ["1", "3"]
    for ways in found["adapters"].values():
        assert ways[sharing.WHOLE]["ratio"] == [1, 1, 1]
        for figures in ways.values():
            assert all(low <= middle <= high for middle, low, high in figures.values())
    shown = sharing.table(json.loads(json.dumps(found)))
    assert [row.split("  ")[0] for row in shown.splitlines()[1:6]] == list(ways)


def test_answers_from_wrong_states_are_no_result(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    states, write = LowerLayers.states, sharing.write_bundle

    def spoilt(*given: Any, **options: Any) -> None:  # the exporter itself would refuse them
        write(*given, **options)
        monkeypatch.setattr(LowerLayers, "states", lambda self, ids, mask: 1 + 3 * states(self, ids, mask))

    monkeypatch.setattr(sharing, "write_bundle", spoilt)
    with refused(DataError, UPPER):
        sharing.measure(tiny_base, sharing.SharingWorkload(1, (1,), 1, Profile.FP32), lambda _: None)


# `python -m benchmarks profile` on a tiny language model: stages, operators, and what is subtracted.
def event(name: str, kind: str, microseconds: int, size: int = 1) -> dict[str, Any]:
    arguments = {"op_name": kind, "output_size": str(size)}
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds, "args": arguments}


def test_the_profilers_own_time_is_subtracted_and_the_prompts_run_does_not_count() -> None:
    prompt = [event("q", "MatMul", 900), event("shape", "Reshape", 5)]
    token = [
        event("q", "MatMul", 24),
        event("q.lora_A", "MatMul", 9),
        event("head", "MatMul", 104, size=100),
        event("attention", "Attention", 34, size=1000),
        event("shape", "Reshape", 4),
    ]
    found = operators([{"cat": "Session", "name": "model_run", "dur": 7}, *prompt, *token, *token], 2)
    assert [(one.name, one.nodes, round(1e6 * one.seconds)) for one in found] == [
        ("MatMul, of the logits", 1, 100),
        ("Attention", 1, 30),
        ("MatMul", 1, 20),
        ("MatMul, of the adapter", 1, 5),
        ("Reshape", 1, 0),
    ]


@pytest.mark.slow
def test_the_stages_of_a_start_and_the_operators_of_a_token_are_shown(lm_bundle: Path) -> None:
    given = ["profile", "--bundle", str(lm_bundle), "--adapter", "anna", "--tokens", "5", "--threads", "1"]
    result = CliRunner().invoke(bench, [*given, "--json"])
    assert result.exception is None, result.output
    found = json.loads(result.stdout)
    stages = [stage["name"] for stage in found["stages"]]
    assert stages[1:5] == ["imports", "verification", "model and tokenizer", "adapter"]
    assert stages[-1] == "5 tokens"
    assert all(stage["seconds"] > 0 for stage in found["stages"])
    if sys.platform == "linux":
        assert all(stage["resident"] > 10**6 for stage in found["stages"])
    nodes = {one["name"]: one["nodes"] for one in found["operators"]}
    assert nodes["GroupQueryAttention"] == 2
    assert nodes["MatMul, of the adapter"] == 2 * nodes["Add, of the adapter"] > 0
    assert sum(name.endswith(", of the logits") for name in nodes) == 1
    assert found["token_s"] > 0 < found["profiled_s"]
    assert 0 < found["library"]["resident"] < found["stages"][-1]["resident"]
    shown = CliRunner().invoke(bench, given).stdout
    assert "GroupQueryAttention" in shown
    assert "not attributed" in shown


# Another tenant takes the memory of its adapter, and a second process shares the base.
@pytest.fixture
def int8_bundle(tmp_path: Path, exported_int8: ExportedBase, source: Any, vendor: IdentityKey) -> Path:
    write_bundle(tmp_path / "bundle", exported_int8, [source()], key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    return tmp_path / "bundle"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc/PID/smaps_rollup")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8_bundle", "lm_bundle"])
def test_a_tenant_takes_about_the_memory_of_its_adapter(request: pytest.FixtureRequest, kind: str) -> None:
    found: Any = json.loads(json.dumps(memory.measure(request.getfixturevalue(kind), counts=(1, 100))))
    assert list(found["tenants"]) == ["1", "100"]
    assert len(found["processes"]) == 2
    # Besides the tensors there are their names, shapes and the signed manifest, and what the allocator keeps.
    assert 0.8 * found["adapter_bytes"] < found["bytes_per_tenant"] < found["adapter_bytes"] + 60_000
    for pages in (*found["tenants"].values(), *found["processes"]):
        assert 0 < pages["private"] <= pages["pss"] <= pages["rss"]
        assert pages["rss"] == pytest.approx(pages["shared"] + pages["private"], rel=0.05)
    for pages in found["mapped"] if kind == "int8_bundle" else ():  # its embeddings, which are not copied
        assert pages["rss"] == pages["shared"] > 0  # both processes look the same pages up


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc/PID/smaps_rollup")
def test_the_temporary_bundle_is_removed(bundle: Path, tmp_path: Path) -> None:
    with memory.with_tenants(Library.open(bundle, None), "global", 3) as copy:
        library = Library.open(copy, None)
        assert library.names() == ["tenant-0", "tenant-1", "tenant-2"]
        assert {library.trust.adapter(n, library.base).manifest.rank for n in library.names()} == {4}
    assert not copy.exists()
