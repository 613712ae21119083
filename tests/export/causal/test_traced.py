"""Decoders on the traced path give torch's logits, and onnxruntime-genai runs them.

A trace takes seconds: all bases except GPT-2 have one layer.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError
from aggregation.pki.identity import IdentityKey
from client.inference.engine import GenerationEngine
from client.inference.generate import Generator
from client.inference.library import Library
from client.inference.text import SamplingParams
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base, find_base
from edgeadapt.formats.graphinputs import to_inputs
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.causal import build, tensors
from export.bundle.base import usual_task
from export.bundle.write import AdapterSource, write_bundle
from export.causal import builder, export_causal, traced
from export.causal.builder import BuilderPathError
from export.causal.sample import Sample, sample_logits
from export.onnx import graph as tracing
from export.onnx import headers, segments
from export.onnx.exported import ExportedBase, Profile
from export.onnx.tensorstore import OnDisk
from tests.support import refused
from tests.support.exhaustive import few
from tests.support.models import adapter_inputs
from tests.support.traces import traced_anew

GPT2 = ("c_attn", "c_proj", "c_fc")
NEOX = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
OPT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
ONE = {"num_hidden_layers": 1}
Case = tuple[str, dict[str, Any], tuple[str, ...]]
OPT_CASE: Case = ("opt", ONE | {"ffn_dim": 96, "word_embed_proj_dim": 64}, OPT)
CASES = few(
    [("gpt2", {}, GPT2), ("gpt_neox", ONE | {"num_key_value_heads": 4}, NEOX), OPT_CASE, ("bloom", ONE, NEOX)],
    ("gpt2", {}, GPT2),
)


@pytest.fixture(scope="module")
def made(make_lm: Any) -> Callable[[Case], tuple[Base, ExportedBase]]:
    bases: dict[str, tuple[Base, ExportedBase]] = {}

    def make(case: Case) -> tuple[Base, ExportedBase]:
        kind, settings, targets = case
        if kind not in bases:
            base = make_lm(kind, **settings)
            bases[kind] = base, export_causal(base, targets, Profile.FP32)
        return bases[kind]

    return make


def ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 90, (rows, length))


def patterned(base: Base, targets: tuple[str, ...]) -> PeftModel:
    """Every layer adapted, one of them with its own rank and one with its own scaling."""
    inner = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=list(targets),
        rank_pattern={rf".*\.0\..*{targets[-1]}": 11},
        alpha_pattern={rf".*\.{inner.config.num_hidden_layers - 1}\..*{targets[0]}": 40},
    )
    return get_peft_model(inner, config).eval()


@pytest.mark.parametrize("case", CASES)
def test_any_rank_gives_torchs_logits_with_and_without_the_cache(
    made: Any, case: Case, drawn: Any, runner: Any, torch_logits: Any
) -> None:
    base, exported = made(case)
    side, tokens = runner(exported), ids(2, 9)
    for model in (build(base, PeftConfig.lora(rank=5, alpha=7, targets=case[2])), patterned(base, case[2])):
        inputs = to_inputs(drawn(model, 0), adapter_inputs(model).scaling)
        assert set(inputs) == set(exported.manifest.slots)
        expected = torch_logits(model, tokens)
        for first in (None, 1, 4):  # all at once, one by one, both
            np.testing.assert_allclose(side.logits(tokens, inputs, first), expected, atol=1e-4)
        with model.disable_adapter():
            bare = torch_logits(model, tokens)
        np.testing.assert_allclose(side.logits(tokens, {}, 4), bare, atol=1e-4)
        assert np.abs(bare - expected).max() > 0.1


@pytest.fixture(scope="module")
def gpt2(made: Any) -> tuple[Base, ExportedBase]:
    pair: tuple[Base, ExportedBase] = made(CASES[0])
    return pair


def test_a_row_padded_on_the_right_gives_its_own_logits(gpt2: tuple[Base, ExportedBase], runner: Any) -> None:
    side, tokens = runner(gpt2[1]), ids(2, 7)
    mask = np.ones_like(tokens)
    mask[1, 4:] = 0
    empty = {v.name: np.zeros((2, v.shape[1], 0, v.shape[3]), np.float32) for v in side.pasts}
    feeds = {"input_ids": tokens, "attention_mask": mask, "position_ids": np.arange(7)[None].repeat(2, 0)}
    found = side.session.run(["logits"], feeds | empty)[0]
    np.testing.assert_allclose(found[1:, :4], side.logits(tokens[1:, :4], {}), atol=1e-5)


def test_each_row_of_a_batch_has_its_own_adapter(gpt2: tuple[Base, ExportedBase], drawn: Any, runner: Any) -> None:
    base, exported = gpt2
    model, side, tokens = build(base, PeftConfig.lora(rank=3, targets=GPT2)), runner(exported), ids(2, 5)
    inputs = [to_inputs(drawn(model, seed), adapter_inputs(model).scaling) for seed in range(2)]
    found = side.logits(tokens, {name: np.stack([row[name] for row in inputs]) for name in inputs[0]}, 2)
    for row in range(2):
        np.testing.assert_allclose(found[row : row + 1], side.logits(tokens[row : row + 1], inputs[row], 2), atol=1e-4)


LIMITS = {Profile.NATIVE_INT8: 3e-3, Profile.WEB_INT8: 2e-2, Profile.NATIVE_INT4: 0.1}


@pytest.mark.parametrize("profile", few(LIMITS, Profile.NATIVE_INT4))
def test_a_quantized_base_gives_nearly_torchs_logits_and_leaves_no_weight_in_float(
    gpt2: tuple[Base, ExportedBase], drawn: Any, runner: Any, torch_logits: Any, profile: Profile
) -> None:
    base, exact = gpt2
    exported = export_causal(base, GPT2, profile)
    model, tokens = build(base, PeftConfig.lora(rank=4, targets=GPT2)), ids(2, 12)
    inputs, expected = to_inputs(drawn(model, 5), adapter_inputs(model).scaling), torch_logits(model, tokens)
    error = np.square(runner(exported).logits(tokens, inputs, 8) - expected).sum() / np.square(expected).sum()
    assert 1e-9 < error < LIMITS[profile]
    assert exported.manifest.slots == exact.manifest.slots
    if profile is not Profile.WEB_INT8:  # which may leave some, as measured
        stored = onnx.load_from_string(exported.model).graph.initializer
        floats = [t.name for t in stored if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2]
        assert [n for n in floats if "scales" not in n and n not in exported.manifest.slots] == []


@pytest.mark.exhaustive
def test_the_same_base_exports_to_the_same_bytes_without_any_path(gpt2: tuple[Base, ExportedBase]) -> None:
    base, exported = gpt2
    with traced_anew():
        again = export_causal(base, GPT2, Profile.FP32)
    assert again.manifest.files == exported.manifest.files
    for name in exported.manifest.files:
        blob = exported.read(name)
        for trace in (b"site-packages", b".py", b"/tmp/", str(base.folder).encode()):
            assert trace not in blob, name


def test_an_embedding_that_is_also_the_output_layer_is_stored_once_and_the_settings_state_the_sizes(
    gpt2: tuple[Base, ExportedBase],
) -> None:
    native = onnx.load_from_string(gpt2[1].model)
    assert [list(t.dims) for t in native.graph.initializer if 98 in t.dims] == [[98, 64]]
    stated = json.loads(gpt2[1].read("genai_config.json"))["model"]
    decoder = stated["decoder"]
    assert (stated["context_length"], stated["vocab_size"], stated["eos_token_id"]) == (64, 98, 2)
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (2, 4, 16)
    inputs = {v.name: v for v in onnx.load_from_string(gpt2[1].read(headers.WEB_MODEL)).graph.input}
    shape = inputs["past_key_values.1.value"].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == ["batch", 4, "past", 16]


@pytest.mark.parametrize("case", CASES)
def test_a_device_generates_torchs_text_with_and_without_an_adapter(
    made: Any, case: Case, drawn: Any, tmp_path: Path
) -> None:
    base, exported = made(case)
    model = build(base, PeftConfig.lora(rank=4, targets=case[2]))
    drawn(model, 3)
    key = IdentityKey.generate(SystemEntropy())
    source = AdapterSource("global", tensors(model), (), 1, "a" * 64, adapter_inputs=adapter_inputs(model))
    write_bundle(tmp_path / "lm", exported, [source], key=key, form="fp32")
    (tmp_path / "trust.pem").write_bytes(key.public.to_pem())
    library = Library.open(tmp_path / "lm", None)
    engine = GenerationEngine(library.base, 1)
    generator = Generator(library, engine, loaded=8, loaded_bytes=2**20)
    prompts = ("turn on the light", "turn on the light in the hall")  # the second reuses the cache of the first

    def written(adapter: str | None = None) -> list[str]:
        return ["".join(generator.complete(prompt, SamplingParams(max_tokens=12), adapter)) for prompt in prompts]

    def by_torch() -> list[str]:
        return [continued(model, engine, prompt) for prompt in prompts]

    with model.disable_adapter():
        bare = written()
        assert bare == by_torch()
        assert generator.last is not None
        assert generator.last.reused_tokens > 0
    assert written("global") == by_torch() != bare


def continued(model: PeftModel, engine: GenerationEngine, prompt: str) -> str:
    tokens = engine.encode(prompt)
    given = {"attention_mask": torch.ones(1, len(tokens)), "do_sample": False, "max_new_tokens": 12}
    with torch.no_grad():
        sequence = model.generate(torch.tensor([tokens]), **given)[0].tolist()
    decoder = engine.decoder()
    return "".join(decoder.decode(token) for token in sequence[len(tokens) :])


@pytest.mark.exhaustive
def test_a_sliding_window_that_the_builder_leaves_out_is_kept(
    make_lm: Any, runner: Any, torch_logits: Any, builder_errors: list[str]
) -> None:
    base, tokens = make_lm("mistral", **ONE, sliding_window=4), ids(2, 12)
    model, side = (
        build(base, PeftConfig.lora(targets=("q_proj",))),
        runner(export_causal(base, ("q_proj",), Profile.FP32)),
    )
    assert builder_errors == ["sliding_window"]
    for first in (None, 1, 7):
        np.testing.assert_allclose(side.logits(tokens, {}, first), torch_logits(model, tokens), atol=1e-4)


@pytest.fixture
def builder_errors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each ``BuilderPathError`` of an export was about."""
    errors: list[str] = []
    build = builder.build

    def recorded(*arguments: Any) -> builder.DecoderGraph:
        try:
            return build(*arguments)
        except BuilderPathError as error:
            errors.append(error.about)
            raise

    monkeypatch.setattr(builder, "build", recorded)
    return errors


WRONG_ON_THE_BUILDER_PATH: list[dict[str, Any]] = [
    {"head_dim": 20, "hidden_size": 60},  # ONNX Runtime's attention takes multiples of 8 only
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    {"intermediate_size": 98},  # equal to the vocabulary: the builder mistakes a gate for the output layer
    {"kind": "olmo"},  # its norms have no weights
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", few(WRONG_ON_THE_BUILDER_PATH, WRONG_ON_THE_BUILDER_PATH[0]))
def test_a_base_that_the_builder_builds_wrong_takes_the_traced_path(
    make_lm: Any, runner: Any, torch_logits: Any, builder_errors: list[str], settings: dict[str, Any]
) -> None:
    base, tokens = make_lm(**ONE, **settings), ids(2, 12)
    side = runner(export_causal(base, ("q_proj",), Profile.FP32))
    assert builder_errors == ["logits"]
    np.testing.assert_allclose(side.logits(tokens, {}, 7), torch_logits(_torch(base), tokens), atol=1e-4)


@pytest.mark.slow
def test_a_traced_graph_that_does_not_give_torchs_logits_is_refused(make_lm: Any, tmp_path: Path) -> None:
    base = make_lm("gpt2", **ONE)
    right = sample_logits(_torch(base), pretrained.tokenizer(base))
    with refused(ConfigError, "logits"):
        traced.build(base, Sample(right.ids, right.logits * np.float32(1.01)), OnDisk(tmp_path / "tensors"))


def _longrope(long: float) -> dict[str, Any]:
    """Other factors from position 80 on, which the sample of 64 tokens does not reach."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 80}
    return {
        "max_position_embeddings": 256,
        "rope_parameters": rope | {"short_factor": [1.0] * 8, "long_factor": [long] * 8},
    }


@pytest.mark.exhaustive
def test_longrope_is_exact_past_its_original_length(make_lm: Any, runner: Any, torch_logits: Any) -> None:
    base, tokens = make_lm("llama", **ONE, **_longrope(3.0)), ids(1, 100)
    side, model = runner(export_causal(base, ("q_proj",), Profile.FP32)), _torch(base)
    for length in (80, 81, 100):
        found = side.logits(tokens[:, :length], {})
        np.testing.assert_allclose(found, torch_logits(model, tokens[:, :length]), atol=1e-4)
    with torch.no_grad():
        cache = DynamicCache()
        parts = [
            model(input_ids=torch.from_numpy(part), past_key_values=cache).logits.numpy()
            for part in np.split(tokens, range(70, 100), axis=1)
        ]
    expected = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(side.logits(tokens, {}, 70), expected, atol=1e-4)


@pytest.mark.exhaustive
def test_a_graph_without_the_factors_of_long_texts_is_refused(make_lm: Any, tmp_path: Path) -> None:
    without, model = make_lm("llama", **ONE, **_longrope(1.0)), _torch(make_lm("llama", **ONE, **_longrope(3.0)))
    sample = sample_logits(model, pretrained.tokenizer(without))
    short = replace(sample, far=None)  # shows no difference
    assert traced.build(without, short, OnDisk(tmp_path / "one"))
    again = Base(without.folder, "a digest of its own, so that it is traced again")
    with refused(ConfigError, "logits"):
        traced.build(again, sample, OnDisk(tmp_path / "two"))
    with refused(BuilderPathError, "logits"):
        builder.build(again, model.config, sample, OnDisk(tmp_path / "three"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["gpt2", "olmo"])  # Conv1D and Linear
def test_weights_that_are_not_in_memory_while_torch_traces_give_the_same_graph(
    make_lm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    base = make_lm(kind, **ONE)
    sample, expected = sample_logits(_torch(base), pretrained.tokenizer(base)), []
    for small, limit in ((tracing.SMALL, segments.LIMIT), (0, 20_000)):
        monkeypatch.setattr(tracing, "SMALL", small)
        monkeypatch.setattr(segments, "LIMIT", limit)
        store = OnDisk(tmp_path / str(small))
        made = traced.build(base, sample, store).graph
        expected.append({tensor.name: np.array(store.array(tensor)) for tensor in made.graph.initializer})
    assert expected[0].keys() == expected[1].keys()
    for name, value in expected[0].items():
        np.testing.assert_array_equal(expected[1][name], value)


@pytest.mark.parametrize("window", [None, 64])
def test_a_window_as_long_as_the_longest_text_takes_the_builder_path(
    make_lm: Any, window: int | None, tmp_path: Path
) -> None:
    files = _built(make_lm("mistral", sliding_window=window), tmp_path).files
    assert json.loads(files["genai_config.json"])["model"]["type"] == "mistral"


@pytest.mark.exhaustive
def test_rows_with_their_own_adapters_in_a_layer_that_flattens_the_batch_are_an_error(
    made: Any, drawn: Any, runner: Any
) -> None:
    base, exported = made(OPT_CASE)  # fc1 and fc2
    model = build(base, PeftConfig.lora(rank=3, targets=OPT))
    inputs = [to_inputs(drawn(model, seed), adapter_inputs(model).scaling) for seed in range(2)]
    both = {name: np.stack([row[name] for row in inputs]) for name in inputs[0]}
    with pytest.raises((Fail, InvalidArgument, RuntimeException)):
        runner(exported).logits(ids(2, 5), both)


@pytest.mark.exhaustive
@pytest.mark.parametrize("profile", [Profile.NATIVE_INT8, Profile.NATIVE_INT4])
def test_layers_that_flatten_the_batch_are_quantized_too(
    made: Any, runner: Any, torch_logits: Any, profile: Profile
) -> None:
    base, _ = made(OPT_CASE)
    tokens, expected = ids(2, 7), torch_logits(AutoModelForCausalLM.from_pretrained(base.folder), ids(2, 7))
    found = runner(export_causal(base, OPT, profile)).logits(tokens, {}, 3)
    assert 1e-9 < np.square(found - expected).sum() / np.square(expected).sum() < 0.1


def test_an_encoder_decoder_is_refused_by_name(tiny_base: Base, tmp_path: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((tiny_base.folder / name).read_bytes())
    t5 = AutoConfig.for_model("t5", num_layers=2, architectures=["T5ForConditionalGeneration"])
    t5.save_pretrained(tmp_path)
    base = find_base(str(tmp_path))
    for refuse in (usual_task, lambda base: export_causal(base, ("q",), Profile.FP32)):
        with refused(ConfigError, "is_encoder_decoder", value="t5"):
            refuse(base)


@pytest.mark.parametrize("kind", few(["llama", "stablelm"], "llama"))  # builder and traced path
def test_every_token_that_ends_a_text_is_kept(make_lm: Any, kind: str) -> None:
    base = make_lm(kind, **ONE)
    (base.folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2, 7]}')
    exported = export_causal(base, ("q_proj",), Profile.FP32)
    assert json.loads(exported.read("genai_config.json"))["model"]["eos_token_id"] == [2, 7]


def test_a_base_without_an_end_token_or_a_longest_text_is_refused(make_lm: Any, tmp_path: Path) -> None:
    with refused(ConfigError, "eos_token_id"):
        _trace(make_lm("gpt2", eos_token_id=None, bos_token_id=None), {"eos_token": None}, tmp_path / "one")
    with refused(ConfigError, "max_position_embeddings"):
        _trace(make_lm("bloom", max_position_embeddings=None), {}, tmp_path / "two")


def _trace(base: Base, tokenizer: dict[str, Any], place: Path) -> None:
    path = base.folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | tokenizer).items() if v}))
    traced.build(base, sample_logits(_torch(base), pretrained.tokenizer(base)), OnDisk(place))


def _built(base: Base, tmp_path: Path) -> builder.DecoderGraph:
    model = _torch(base)
    return builder.build(
        base, model.config, sample_logits(model, pretrained.tokenizer(base)), OnDisk(tmp_path / "tensors")
    )


def _torch(base: Base) -> Any:
    return pretrained.load(base, AutoModelForCausalLM)
