"""Language models on the builder path give torch's logits for any adapter, batch and cache."""

import logging
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base, find_base
from edgeadapt.formats.graphinputs import to_inputs
from edgeadapt.formats.keyfiles import make_key
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.causal import build
from export.causal import export_causal
from export.onnx import headers
from export.onnx.exported import ExportedBase, Profile
from tests.support import refused
from tests.support.models import adapter_inputs
from tests.support.trial import call

ARCHITECTURES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    ("qwen2", {}),  # with biases on q, k and v
    ("qwen3", {"tie_word_embeddings": False}),  # with norms on q and k
]


@pytest.fixture(scope="module")
def exported(llama: Base, every_layer: tuple[str, ...]) -> ExportedBase:
    return export_causal(llama, every_layer, Profile.FP32)


def ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 90, (rows, length))


@pytest.mark.parametrize(("kind", "settings"), ARCHITECTURES)
def test_every_layer_takes_an_adapter_and_gives_torchs_logits(
    make_lm: Any, every_layer: tuple[str, ...], drawn: Any, runner: Any, torch_logits: Any, kind: str, settings: Any
) -> None:
    base = make_lm(kind, **settings)
    onnx_side = runner(export_causal(base, every_layer, Profile.FP32))
    model = build(base, PeftConfig.lora(rank=5, alpha=7, targets=every_layer))
    inputs = to_inputs(drawn(model, 0), adapter_inputs(model).scaling)
    tokens = ids(3, 9)
    expected = torch_logits(model, tokens)
    for first in (None, 1, 4):  # all at once, one by one, both
        np.testing.assert_allclose(onnx_side.logits(tokens, inputs, first), expected, atol=1e-4)
    with model.disable_adapter():
        np.testing.assert_allclose(onnx_side.logits(tokens, {}), torch_logits(model, tokens), atol=1e-4)


def test_layers_with_their_own_ranks_and_scalings(
    llama: Base, exported: ExportedBase, drawn: Any, runner: Any, torch_logits: Any
) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        rank_pattern={r"layers\.0.*down_proj": 11, r"layers\.1.*k_proj": 1},
        alpha_pattern={r"layers\.1.*v_proj": 40},
        use_rslora=True,
    )
    inner = AutoModelForCausalLM.from_pretrained(llama.folder, dtype=torch.float32)
    model = get_peft_model(inner, config).eval()
    inputs = to_inputs(drawn(model, 1), adapter_inputs(model).scaling)
    tokens = ids(2, 6)
    np.testing.assert_allclose(runner(exported).logits(tokens, inputs, 3), torch_logits(model, tokens), atol=1e-4)


def test_each_row_of_a_batch_has_its_own_adapter(
    llama: Base, exported: ExportedBase, every_layer: tuple[str, ...], drawn: Any, runner: Any
) -> None:
    model, side = build(llama, PeftConfig.lora(rank=3, targets=every_layer)), runner(exported)
    inputs = [to_inputs(drawn(model, seed), adapter_inputs(model).scaling) for seed in range(3)]
    tokens = ids(3, 5)
    found = side.logits(tokens, {name: np.stack([row[name] for row in inputs]) for name in inputs[0]}, 2)
    for row in range(3):
        np.testing.assert_allclose(found[row : row + 1], side.logits(tokens[row : row + 1], inputs[row], 2), atol=1e-5)


def test_the_base_manifest_states_task_slots_and_highest_rank(llama: Base) -> None:
    exported = export_causal(llama, ("v_proj", "q_proj"), Profile.FP32, max_rank=16)
    assert (exported.manifest.task, exported.manifest.max_rank) == ("text-generation", 16)
    assert list(exported.manifest.slots) == [
        f"model.layers.{layer}.self_attn.{part}_proj.lora_{side}.weight"
        for layer in range(2)
        for part in "qv"
        for side in "AB"
    ]
    assert exported.manifest.slots["model.layers.0.self_attn.v_proj.lora_A.weight"] == ("64", "rank_1")
    assert exported.manifest.slots["model.layers.0.self_attn.v_proj.lora_B.weight"] == ("rank_1", "32")


def test_the_web_header_has_no_defaults_and_the_same_weights(exported: ExportedBase) -> None:
    native, web = (onnx.load_from_string(exported.read(name)) for name in (headers.MODEL, headers.WEB_MODEL))
    assert {value.name for value in web.graph.input} == {value.name for value in native.graph.input}
    assert not {tensor.name for tensor in web.graph.initializer} & set(exported.manifest.slots)
    assert set(exported.manifest.slots) <= {tensor.name for tensor in native.graph.initializer}


PROCESS = """
import logging, sys
from edgeadapt import program
path = sys.path[:]
program.cli(sys.argv[1:], standalone_mode=False)
print(path == sys.path, logging.getLogger().handlers, logging.getLogger().level)
"""


@pytest.mark.slow
def test_two_processes_in_two_folders_write_the_same_bundle_and_the_builder_changes_no_path_or_logging(
    llama: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a hash seed and a copy of the base of its own."""
    make_key(tmp_path / "key.pem", SystemEntropy())
    made = ("bundle", "make", "--base", "base", "--profile", "web-int8", "--bundle", "bundle", "--key", "../key.pem")
    for name in ("here", "there"):
        shutil.copytree(llama.folder, tmp_path / name / "base")
    monkeypatch.chdir(tmp_path / "here")
    call(*made)
    environment = os.environ | {"PYTHONHASHSEED": "777", "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", PROCESS, *made]
    done = subprocess.run(command, cwd=tmp_path / "there", env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"True [] {logging.WARNING}"
    assert "builder" not in done.stderr.lower()
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "bundle").rglob("*") if path.is_file()}
        for name in ("here", "there")
    )
    assert first == second
    assert onnx.load_from_string(first[headers.WEB_MODEL]).producer_version == version("edgeadapt")


def test_no_file_contains_a_path_of_the_exporting_machine_or_an_embedding_twice(
    exported: ExportedBase, llama: Base
) -> None:
    for name in exported.manifest.files:
        blob = exported.read(name)
        assert str(llama.folder).encode() not in blob, name
        assert b"/tmp/" not in blob, name
    large = [t for t in onnx.load_from_string(exported.model).graph.initializer if list(t.dims) in ([98, 64], [64, 98])]
    assert [list(tensor.dims) for tensor in large] == [[98, 64]]  # also the output layer


def test_a_layer_that_cannot_have_a_slot_is_refused_by_name(llama: Base) -> None:
    with refused(ConfigError, "--targets"):
        export_causal(llama, ("q_proj", "query", "value"), Profile.FP32)
    with refused(ConfigError, "Embedding", value="model.embed_tokens"):
        export_causal(llama, ("embed_tokens",), Profile.FP32)


def test_weights_in_parts_give_the_same_graph(llama: Base, tmp_path: Path) -> None:
    pretrained.load(llama, AutoModelForCausalLM).save_pretrained(tmp_path, max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((llama.folder / name).read_bytes())
    parts = find_base(str(tmp_path))
    assert len(parts.weight_files) > 2
    made = [export_causal(base, ("q_proj",), Profile.FP32) for base in (llama, parts)]
    one, several = ({name: base.read(name) for name in base.manifest.files} for base in made)
    for files in (one, several):  # the headers name the base
        for name in (headers.MODEL, headers.WEB_MODEL):
            header = onnx.load_from_string(files[name])
            del header.metadata_props[:]
            files[name] = header.SerializeToString(deterministic=True)
    assert one == several


def test_matmuls_of_one_input_are_merged(llama: Base) -> None:
    native = onnx.load_from_string(export_causal(llama, ("q_proj", "v_proj"), Profile.NATIVE_INT4).model)
    kinds = [node.op_type for node in native.graph.node]
    # In each layer q, k, v; o; gate, up; down. Then the output layer.
    assert (kinds.count("MatMulNBits"), kinds.count("Split"), kinds.count("MatMul")) == (2 * 4 + 1, 2 * 2, 2 * 4)


# The memory that an export takes


LIBRARIES = 700e6  # bytes: of the process before it reads a weight, and of what it imports later
A_PARAMETER = 6  # bytes at most; the float32 model alone takes 4
CHILD = """
import sys
from edgeadapt.bases.base import find_base
from export.causal import export_causal
from export.onnx.exported import Profile
exported = export_causal(find_base(sys.argv[1]), ("q_proj", "v_proj"), Profile.NATIVE_INT8)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss would count the parent
print(int(peak.split()[1]) * 1024, exported.size)
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_the_export_of_a_large_base_takes_few_bytes_a_parameter(make_lm: Any) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
    base = make_lm("llama", **sizes, **heads, dtype=torch.bfloat16)
    with safe_open(base.weight_files[0], "pt") as file:
        parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118  # it is no dictionary
    assert 1.2e8 < parameters < base.weight_bytes / 2
    command = [sys.executable, "-c", CHILD, str(base.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    assert size > parameters
    assert peak < LIBRARIES + A_PARAMETER * parameters
