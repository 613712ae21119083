"""Folders that the real peft writes and reads: the same scaling and outputs, and a refusal of everything else."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, HRAConfig, LoraConfig, PeftModel, PeftType, get_peft_model, load_peft_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from aggregation.errors import ConfigError, DataError, EdgeAdaptError
from edgeadapt.bases.base import Base
from edgeadapt.formats import files
from edgeadapt.formats.graphinputs import PREFIX, from_inputs, to_inputs
from edgeadapt.formats.manifest import Format
from edgeadapt.formats.peftconfig import PeftConfig, require_trainable
from edgeadapt.methods.classifier import PhraseClassifier, load, tensors
from edgeadapt.methods.peft.config import HARMLESS, MERGED, config_of
from edgeadapt.methods.peft.folder import CONFIG, WEIGHTS, read_peft, to_peft
from edgeadapt.methods.peft.inputs import AdapterInputs
from export.bundle.adapter import decode, encode
from export.onnx.exported import ExportedBase
from tests.support import refused
from tests.support.models import adapter_inputs

IDS = torch.tensor([[1, 5, 9, 3, 7], [2, 2, 4, 8, 6]])
TEXTS = ["turn on the kitchen lights", "lock the door", "play music"]


class Net(nn.Module):
    """Small enough to be built a hundred times; patterns are matched with its paths."""

    def __init__(self) -> None:
        super().__init__()
        block = {"q_proj": nn.Linear(6, 6), "v_proj": nn.Linear(6, 4)}
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": nn.ModuleDict(block)}) for _ in range(2))
        self.q_proj = nn.Linear(6, 6)
        self.xq_proj = nn.Linear(6, 6)
        self.score = nn.Linear(4, 3)


def llama() -> LlamaForCausalLM:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    generator = torch.Generator().manual_seed(3)  # of its own: two calls make the same base
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def filled(model: PeftModel) -> PeftModel:
    """The model with random values in its adapter, so that B is not zero and every scaling has an effect."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def answers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


PATTERNS = st.sampled_from(
    [
        *("q_proj", "v_proj", "layers.0.attn.q_proj", r"layers\.1\..*", ".*proj", "^q_proj", "attn.q_proj"),
        *("_proj", "x?q_proj", r"layers\.\d+\.attn\.v_proj", "nothing", "(q|v)_proj", "layers.1.attn"),
    ]
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(PATTERNS, st.integers(1, 6), max_size=4),
    st.dictionaries(PATTERNS, st.integers(1, 64), max_size=4),
    st.booleans(),
)
@pytest.mark.filterwarnings("ignore:The following")
def test_every_layer_is_scaled_as_peft_scales_it_whatever_the_patterns(
    tmp_path_factory: pytest.TempPathFactory, ranks: dict[str, int], alphas: dict[str, int], stabilized: bool
) -> None:
    folder = tmp_path_factory.mktemp("peft")
    names = {"target_modules": ["q_proj", "v_proj", "xq_proj"], "modules_to_save": ["score"]}
    # peft sorts patterns when it saves, so that a folder's patterns are the sorted ones.
    patterns = {"rank_pattern": dict(sorted(ranks.items())), "alpha_pattern": dict(sorted(alphas.items()))}
    model = get_peft_model(Net(), LoraConfig(r=3, lora_alpha=8, use_rslora=stabilized, **names, **patterns))
    model.save_pretrained(folder)
    read = read_peft(folder)
    found = AdapterInputs.of_tensors(read.peft_config, read.tensors)
    assert found.scaling == adapter_inputs(model).scaling
    assert set(found.names) == set(adapter_inputs(model).names)
    back = folder / "back"
    to_peft(read.tensors, read.peft_config, back)
    assert adapter_inputs(PeftModel.from_pretrained(Net(), back)).scaling == adapter_inputs(model).scaling


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True, "lora_alpha": 5},
        {"rank_pattern": {r"layers\.0.*": 2}, "alpha_pattern": {"v_proj": 24}},
        {"layers_to_transform": [1]},
        {"target_modules": "all-linear", "modules_to_save": None},
        {"modules_to_save": ["lm_head", "norm"]},
    ],
)
def test_a_llama_read_from_peft_and_written_back_gives_the_same_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}
    model = filled(get_peft_model(llama(), LoraConfig(**(chosen | changes))))
    model.save_pretrained(tmp_path / "theirs")
    read = read_peft(tmp_path / "theirs")
    to_peft(read.tensors, read.peft_config, tmp_path / "ours", "somebody/llama")
    reopened = PeftModel.from_pretrained(llama(), tmp_path / "ours")
    assert torch.equal(answers(reopened), answers(model))
    assert not torch.equal(answers(reopened), answers(llama()))
    assert reopened.peft_config["default"].base_model_name_or_path == "somebody/llama"


@pytest.mark.parametrize(
    ("stated", "numbers"),
    [
        ({"layers_to_transform": [3, 1]}, (1, 3)),
        ({"layers_to_transform": 2}, (2,)),
        ({"layers_to_transform": None}, ()),
        # The numbers are of one list among several, which show in the tensors alone.
        ({"layers_to_transform": [1], "layers_pattern": "blocks"}, ()),
    ],
)
def test_the_numbers_of_adapted_layers_are_read(stated: dict[str, Any], numbers: tuple[int, ...]) -> None:
    assert config_of({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | stated).layers_to_transform == numbers


@pytest.mark.parametrize("layers", ["all", [-1], [1.5], [True], [[1]]])
def test_layers_that_are_not_numbers_are_refused(layers: Any) -> None:
    with refused(DataError, "layers_to_transform"):
        config_of({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "layers_to_transform": layers})


def classifier(base: Base) -> PhraseClassifier:
    return PhraseClassifier(AutoModel.from_pretrained(base.folder), 4).eval()


@pytest.mark.parametrize(("form", "tolerance"), [("fp32", 1e-6), ("int8", 0.05)])
def test_an_adapter_file_opens_in_peft_with_its_scaling_unfolded(
    tmp_path: Path, model: PeftModel, exported: ExportedBase, tiny_base: Base, form: Format, tolerance: float
) -> None:
    values, method = tensors(model), PeftConfig("LORA", 4, 8, ("query", "value"))
    inputs = decode(encode(values, exported.adapter_inputs, form), form)
    found = from_inputs(inputs, AdapterInputs.of_tensors(method, values).scaling)
    for name, value in values.items():
        assert np.abs(found[name] - value).max() <= tolerance * np.abs(value).max()
    to_peft(found, method, tmp_path / "peft")
    reopened = PeftModel.from_pretrained(classifier(tiny_base), tmp_path / "peft")
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        difference = reopened(IDS, mask) - model(IDS, mask)
    assert difference.abs().max() < 20 * tolerance


def test_the_ranks_that_adalora_allocated_come_back(tmp_path: Path) -> None:
    """Once its allocator has run, layers have ranks of their own: such an adapter is read, and not trained on."""
    net = get_peft_model(Net(), AdaLoraConfig(init_r=4, target_r=2, target_modules=["q_proj", "v_proj"], total_step=9))
    kept = {"layers.0.attn.q_proj.lora_E": [True, False, True, True], "q_proj.lora_E": [False, True, True, False]}
    net.peft_config["default"].rank_pattern = kept
    filled(net).save_pretrained(tmp_path / "theirs")
    read = read_peft(tmp_path / "theirs")
    paths = ("layers.0.attn.q_proj", "q_proj", "layers.0.attn.v_proj")
    assert [read.peft_config.rank_of(path) for path in paths] == [3, 2, 4]
    with refused(ConfigError, "rank_pattern"):
        require_trainable(read.peft_config)
    to_peft(read.tensors, read.peft_config, tmp_path / "ours")
    theirs, ours = (load_peft_weights(str(tmp_path / name)) for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    plain, state = Net(), torch.ones(2, 6)
    opened = [PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / name) for name in ("theirs", "ours")]
    for path in paths:
        found, expected = (model.get_base_model().get_submodule(path)(state) for model in opened)
        torch.testing.assert_close(found, expected)


def test_half_precision_folders_are_read_as_the_same_floats(tmp_path: Path, saved: Path) -> None:
    exact = load_file(saved / WEIGHTS)
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        save_file({name: value.to(kind) for name, value in exact.items()}, saved / WEIGHTS)
        for name, value in read_peft(saved).tensors.items():
            np.testing.assert_array_equal(value, exact[name].to(kind).to(torch.float32).numpy())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A sound folder, to be damaged."""
    filled(
        get_peft_model(Net(), LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["score"]))
    ).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("changes", "about"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "some"}, "bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"a_setting_of_tomorrow": 3}, "a_setting_of_tomorrow"),
        ({"a\x1b[31m\nb": 3}, "a\x1b[31m\nb"),
        ({"peft_type": "LOKR"}, "peft_type"),
        ({"peft_type": None}, "peft_type"),
        ({"modules_to_save": None}, "score.bias"),
    ],
)
def test_a_setting_that_a_graph_cannot_express_is_refused_by_name(
    saved: Path, changes: dict[str, Any], about: str
) -> None:
    _configure(saved, changes)
    with refused(ConfigError, about) as caught:
        read_peft(saved)
    assert str(caught.value).isprintable()


def test_the_line_names_setting_value_and_remedy(saved: Path) -> None:
    _configure(saved, {"a\x1b[31m\nb": 3})
    with pytest.raises(ConfigError, match=r"uses 'a\\x1b\[31m\\nb': 3, .*train without it"):
        read_peft(saved)


@pytest.mark.parametrize(
    ("changes", "about"),
    [
        ({"r": "three"}, "r"),
        *(({"r": value}, "r") for value in (-3, 0, 1.5, True, 10**30)),
        *(({"lora_alpha": value}, "lora_alpha") for value in (None, "8", [8], True, 0, -4, 1e300, 10**40)),
        *(({"lora_alpha": float(value)}, "lora_alpha") for value in ("nan", "inf")),
        ({"rank_pattern": {"q_proj": 10**30}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern"),
        ({"r": 5}, "layers.0.attn.q_proj"),
        ({"rank_pattern": {"q_proj": 2}}, "layers.0.attn.q_proj"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"alpha_pattern": {"(": 2}}, "pattern"),
        ({"alpha_pattern": {"q" * 600: 2}}, "alpha_pattern"),
        ({"target_modules": [1, "q_proj"]}, "target_modules"),
        ({"modules_to_save": "score"}, "modules_to_save"),
        ({"modules_to_save": [1]}, "modules_to_save"),
    ],
)
def test_a_configuration_that_is_damaged_or_of_other_tensors_is_refused(
    saved: Path, changes: dict[str, Any], about: str
) -> None:
    _configure(saved, changes)
    with refused(DataError, about) as caught:
        read_peft(saved)
    if about in changes and "modules" not in about:
        assert str(caught.value).startswith(f"{about} in adapter_config.json ")


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000], ids=["empty", "open", "list", "not UTF-8", "deep"]
)
def test_a_configuration_that_is_not_an_object_is_refused(saved: Path, raw: bytes) -> None:
    (saved / CONFIG).write_bytes(raw)
    with refused(DataError, CONFIG):
        read_peft(saved)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda blob: b"",
    "truncated": lambda blob: blob[:-1],
    "trailing": lambda blob: blob + b"\0",
    "header only": lambda blob: blob[:40],
    "huge header": lambda blob: b"\xff" * 8 + blob[8:],
    "noise": lambda blob: b"noise" * 100,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_are_refused(saved: Path, damage: str) -> None:
    (saved / WEIGHTS).write_bytes(DAMAGE[damage]((saved / WEIGHTS).read_bytes()))
    with refused(DataError, WEIGHTS):
        read_peft(saved)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([CONFIG, WEIGHTS]), st.integers(0, 1500), st.integers(0, 255), st.integers(0, 40))
def test_any_bytes_are_read_or_refused_in_one_line(saved: Path, name: str, at: int, byte: int, cut: int) -> None:
    raw = (saved / name).read_bytes()
    damaged = saved.parent / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(saved, damaged)
    (damaged / name).write_bytes(raw[: at % len(raw)] + bytes([byte]) + raw[at % len(raw) + cut :])
    message = ""
    try:
        read_peft(damaged)
    except EdgeAdaptError as error:
        message = str(error)
    assert "\n" not in message


def _change(name: str, value: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(values: dict[str, torch.Tensor]) -> None:
        if value is None:
            del values[name]
        else:
            values[name] = value

    return change


A, B = (f"base_model.model.q_proj.lora_{letter}.weight" for letter in "AB")
BIAS, DORA = "q_proj.lora_B.bias", "q_proj.lora_magnitude_vector.weight"
LONG = f"base_model.model.{'x' * 600}.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "about"),
    [
        (_change(A, torch.full((3, 6), torch.nan)), A),
        (_change(A, torch.full((3, 6), 1e300, dtype=torch.float64)), A),
        (_change(A, torch.ones(4, 6)), "q_proj"),
        (_change(A, torch.ones(3, 6, 1)), "q_proj"),
        (_change(A, None), "q_proj"),
        (_change(B, None), "q_proj"),
        (_change(A, torch.ones(3, 6, dtype=torch.int8)), A),
        (_change("q_proj.lora_A.weight", torch.ones(3, 6)), "q_proj.lora_A.weight"),
        (_change(f"base_model.model.{BIAS}", torch.ones(6)), BIAS),
        (_change(f"base_model.model.{DORA}", torch.ones(6)), DORA),
        (_change(LONG, torch.ones(3, 6)), LONG[:80]),
        (_change("prompt_embeddings", torch.ones(3, 6)), "prompt_embeddings"),
        (_change(f"base_model.model.{PREFIX}", torch.ones(3, 6)), f"base_model.model.{PREFIX}"),
    ],
)
def test_a_tensor_that_no_graph_takes_is_refused(saved: Path, change: Any, about: str) -> None:
    values = load_file(saved / WEIGHTS)
    change(values)
    save_file(values, saved / WEIGHTS)
    with refused(DataError, about):
        read_peft(saved)


def test_pickled_weights_are_not_read(saved: Path) -> None:
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    with refused(ConfigError, "adapter_model.bin"):
        read_peft(saved)


def test_a_folder_without_an_adapter_is_refused(saved: Path, tmp_path: Path) -> None:
    (saved / WEIGHTS).unlink()
    with refused(ConfigError, WEIGHTS):
        read_peft(saved)
    with refused(ConfigError, CONFIG):
        read_peft(tmp_path / "nowhere")
    with refused(ConfigError, CONFIG):
        read_peft(tmp_path)  # peft saves a named adapter in a folder of that name


def test_weights_of_the_base_in_an_adapter_are_refused_with_the_remedy(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj", "lm_head"]))
    model.save_pretrained(tmp_path / "with")
    with pytest.raises(ConfigError, match=r"'lm_head.base_layer.weight' .* save_embedding_layers=False"):
        read_peft(tmp_path / "with")
    model.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    assert "base_model.model.lm_head.lora_A.weight" in read_peft(tmp_path / "without").tensors


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("saved_too", [True, False])
def test_lora_on_an_embedding_is_refused_whether_or_not_the_embedding_was_saved(
    tmp_path: Path, saved_too: bool
) -> None:
    model = get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"]))
    model.save_pretrained(tmp_path, save_embedding_layers=saved_too)
    with refused(ConfigError, "model.embed_tokens.lora_embedding_A"):
        read_peft(tmp_path)


def test_a_method_without_slots_is_refused(tmp_path: Path) -> None:
    get_peft_model(Net(), HRAConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with refused(ConfigError, "peft_type", value="HRA"):
        read_peft(tmp_path)


def test_a_folder_that_is_not_empty_is_left_unchanged(saved: Path, tmp_path: Path) -> None:
    read = read_peft(saved)
    before = {path: path.read_bytes() for path in saved.iterdir()}
    with refused(ConfigError, saved.name):
        to_peft(read.tensors, read.peft_config, saved)
    assert {path: path.read_bytes() for path in saved.iterdir()} == before
    with refused(DataError, min(read.tensors)):
        to_peft({name: value * np.nan for name, value in read.tensors.items()}, read.peft_config, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_the_digest_is_of_the_file_and_equal_adapters_give_equal_folders(saved: Path, tmp_path: Path) -> None:
    read = read_peft(saved)
    assert read.sha256 == files.sha256((saved / WEIGHTS).read_bytes())
    to_peft(read.tensors, read.peft_config, tmp_path / "a")
    to_peft(dict(reversed(read.tensors.items())), read.peft_config, tmp_path / "b")
    assert [(tmp_path / "a" / n).read_bytes() for n in (CONFIG, WEIGHTS)] == [
        (tmp_path / "b" / n).read_bytes() for n in (CONFIG, WEIGHTS)
    ]


def test_unfolding_the_scaling_inverts_folding_it(model: PeftModel) -> None:
    load(model, tensors(model))
    scaling = adapter_inputs(model).scaling
    for name, value in from_inputs(to_inputs(tensors(model), scaling), scaling).items():
        np.testing.assert_allclose(value, tensors(model)[name], rtol=1e-6)


def _configure(folder: Path, changes: dict[str, Any]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


# The page of methods


PAGE = Path("docs/reference/methods.md").read_text()
READ, REFUSED = (
    set(re.findall("`([A-Z_0-9]+)`", "".join(re.findall(r"^\| (`[^|]+)\|", section, re.M))))
    for section in PAGE.partition("## Methods")[2].split("## Refused")
)
RANKS: dict[str, dict[str, int]] = {  # of the methods that need one
    "LORA": {"r": 4, "lora_alpha": 8},
    "ADALORA": {"init_r": 4, "lora_alpha": 8},
    "LOHA": {"r": 4, "alpha": 8},
    "VERA": {"r": 4},
}


def test_the_page_says_which_types_can_be_merged() -> None:
    _, _, section = PAGE.partition("## Refused")
    rows = re.findall(r"^\| (`[^|]+)\|[^|]*\| (yes|no) \|$", section, re.M)
    merged = {name for names, said in rows if said == "yes" for name in re.findall("`([A-Z_0-9]+)`", names)}
    assert {name for names, _ in rows for name in re.findall("`([A-Z_0-9]+)`", names)} == REFUSED
    with_slots = re.findall("`([A-Z_0-9]+)`", section.partition("The types ")[2].partition("merged too")[0])
    assert merged == MERGED - HARMLESS.keys()
    assert set(with_slots) == MERGED & HARMLESS.keys()


def test_the_tables_have_every_type_once() -> None:
    assert READ.isdisjoint(REFUSED)
    assert {kind.value for kind in PeftType} | {"BOTTLENECK"} == READ | REFUSED  # the last is not one of PEFT


@pytest.mark.parametrize("kind", sorted(kind.value for kind in PeftType))
def test_a_type_is_read_or_refused_as_the_page_says(kind: str) -> None:
    settings = {"peft_type": kind, "target_modules": ["query"]} | RANKS.get(kind, {})
    if kind in READ:
        assert config_of(settings).peft_type == kind
    else:
        with refused(ConfigError, "peft_type", value=kind) as caught:
            config_of(settings)
        assert ("'edgeadapt base merge'" in str(caught.value)) == (kind in MERGED)


@pytest.mark.parametrize("kind", [None, 3, [], {}, "lora", "LORA ", "NEW"])
def test_a_type_that_peft_does_not_have_is_refused(kind: object) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        config_of({"peft_type": kind})
    assert "\n" not in str(caught.value)
