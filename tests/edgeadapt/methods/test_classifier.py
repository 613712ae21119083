"""The trainable view of a frozen encoder: which tensors are the adapter, what they change, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModel,
    DebertaV2Config,
    DistilBertConfig,
    FNetConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
)

from aggregation.errors import ConfigError
from client.training import torchengine
from client.training.examples import Example
from client.training.trainer import Trainer
from edgeadapt.bases.base import Base
from edgeadapt.bases.states import StateCache
from edgeadapt.formats import files
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.peftconfig import MethodName, PeftConfig
from edgeadapt.methods import classifier
from edgeadapt.methods.classifier import BATCH, build, in_batches, load, seeded, tensors
from edgeadapt.methods.parts import PARTS
from edgeadapt.methods.trainable import configuration, initial
from edgeadapt.rounds.task import OptimizerName, Task
from tests.support import refused
from tests.support.models import llama, make_lm

__all__ = ["llama", "make_lm"]  # fixtures


pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor([[2, 5, 9, 3, 0, 0], [2, 7, 8, 6, 11, 3]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def model(tiny_base: Any) -> PeftModel:
    return build(tiny_base, 3, PeftConfig.lora(2, 4))


def logits(model: PeftModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, attention_mask=MASK)  # type: ignore[no-any-return]


def test_only_lora_and_head_are_trainable_and_only_they_are_the_adapter(model: PeftModel) -> None:
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    assert all("lora_" in name or "classifier" in name for name in trainable)
    layout = Layout.of(tensors(model))
    assert layout.size == sum(value.numel() for value in model.parameters() if value.requires_grad)
    # Two layers, query and value, A and B of rank 2 over 32; a head of 3 labels.
    assert layout.size == 2 * 2 * 2 * (2 * 32) + 3 * 32 + 3


def test_the_model_is_in_evaluation_mode_so_that_nothing_is_drawn(model: PeftModel) -> None:
    assert not any(module.training for module in model.modules())
    assert torch.equal(logits(model), logits(model))


def test_loaded_tensors_come_back_bit_for_bit_and_as_copies(model: PeftModel) -> None:
    rng = np.random.default_rng(0)
    drawn = {name: rng.standard_normal(t.shape).astype(np.float32) for name, t in tensors(model).items()}
    load(model, drawn)
    found = tensors(model)
    assert found.keys() == drawn.keys()
    assert all(np.array_equal(found[name], drawn[name]) for name in drawn)
    next(iter(found.values()))[:] = 7
    assert all(np.array_equal(tensors(model)[name], drawn[name]) for name in drawn)
    files.decode(files.encode(tensors(model)), Layout.of(drawn))


def test_loading_does_not_change_the_arrays_it_was_given(model: PeftModel) -> None:
    given = {name: np.ones_like(value) for name, value in tensors(model).items()}
    load(model, given)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(1)
    assert all((value == 1).all() for value in given.values())


def test_padding_does_not_reach_the_embedding(model: PeftModel) -> None:
    encoder = model.get_base_model()
    with torch.inference_mode():
        padded, bare = encoder.embed(IDS, MASK)[:1], encoder.embed(IDS[:1, :4], MASK[:1, :4])
    assert torch.allclose(padded, bare, atol=1e-6)
    assert torch.allclose(padded.norm(dim=-1), torch.ones(1))


def test_a_phrase_of_padding_alone_has_a_finite_embedding(model: PeftModel) -> None:
    with torch.inference_mode():
        assert torch.isfinite(model.get_base_model().embed(IDS, torch.zeros_like(MASK))).all()


def test_an_adapter_with_b_at_zero_leaves_the_base_as_it_is(model: PeftModel) -> None:
    start = seeded(model, np.eye(3, 32, dtype=np.float32), torch.Generator().manual_seed(0))
    load(model, start)
    with torch.inference_mode():
        adapted = model.get_base_model().embed(IDS, MASK)
        with model.disable_adapter():
            plain = model.get_base_model().embed(IDS, MASK)
    assert torch.equal(adapted, plain)
    changed = {name: value + (1 if ".lora_B." in name else 0) for name, value in start.items()}
    load(model, {name: value.astype(np.float32) for name, value in changed.items()})
    with torch.inference_mode():
        assert not torch.allclose(model.get_base_model().embed(IDS, MASK), plain, atol=1e-3)


@pytest.mark.parametrize("labels", [-1, 0, 1])
def test_fewer_than_two_labels_are_refused(tiny_base: Any, labels: int) -> None:
    with refused(ConfigError, "labels", value=labels):
        build(tiny_base, labels, PeftConfig.lora())


@pytest.mark.parametrize("targets", [("no_such_layer",), ("",), ("encoder",)])
def test_targets_that_the_base_has_not_are_refused_by_name(tiny_base: Any, targets: tuple[str, ...]) -> None:
    with refused(ConfigError, "target_modules"):
        build(tiny_base, 3, PeftConfig.lora(2, 4, targets))


def test_batches_hold_texts_of_similar_length_and_the_rows_keep_their_order() -> None:
    lengths, seen = [3, 9, 1, 9, 2, 3, 8] * 7, list[int]()

    def forward(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen.append(int((mask == 0).sum()))  # padding
        return ids[:, :1]

    rows = in_batches(forward, [torch.full((length,), text) for text, length in enumerate(lengths)])
    assert rows.flatten().tolist() == list(range(len(lengths)))
    assert len(seen) == -(-len(lengths) // BATCH)
    assert sum(seen) == 84  # in the order of the texts it is 195


# The layers below an adapter, computed once: for every family that begins with states, and for one that cannot.
SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 3}
LABELS, TEXTS = (
    ("a", "b", "c"),
    ("turn on the light", "play music", "set a timer", "kitchen light off", "next song", "ten minutes", "stop"),
)
EXAMPLES = tuple(Example(text, n % 3) for n, text in enumerate(TEXTS))
FAMILIES = (
    DistilBertConfig(pad_token_id=0, dim=32, n_heads=2, n_layers=3, hidden_dim=32),
    RobertaConfig(pad_token_id=0, **SMALL),
    MPNetConfig(pad_token_id=0, **SMALL),
    ModernBertConfig(pad_token_id=0, **SMALL),
    DebertaV2Config(pad_token_id=0, relative_attention=True, pos_att_type=["c2p", "p2c"], **SMALL),
)


def family(config: Any, folder: Path, tokenizer: Path) -> Base:
    config.vocab_size = 75
    model, generator = AutoModel.from_config(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = 0.1 * torch.randn(value.shape, generator=generator)
            value.copy_(noise + 1 if name.lower().endswith(("norm.weight", "layer_norm.weight")) else noise)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return Base(folder, config.model_type)


def task_of(trainer: Trainer, labels: tuple[str, ...]) -> Task:
    # SGD: AdamW makes steps of one size of gradients of any size.
    return Task(trainer.engine.config, labels, 1, 4, 0.05, 0.0, 0.0, PARTS, PARTS, optimizer=OptimizerName.SGD)


def first(trainer: Trainer) -> Tensors:
    return initial(trainer.engine.model, torch.Generator().manual_seed(1))


def trained(trainer: Trainer, start: Tensors, labels: tuple[str, ...] = LABELS, frozen: bool = True) -> Tensors:
    engine: Any = trainer.engine
    engine._states = StateCache(2**20)  # in float32
    kept = engine._frozen
    if not frozen:
        engine._frozen = None
    try:
        task = task_of(trainer, labels)
        return trainer.train(start, EXAMPLES, task, epochs=3, rng=np.random.default_rng(1))
    finally:
        engine._frozen = kept


def assert_same_training(trainer: Trainer, labels: tuple[str, ...] = LABELS) -> None:
    assert trainer.engine._frozen is not None
    start = first(trainer)
    states, whole = trained(trainer, start, labels), trained(trainer, start, labels, frozen=False)
    moved = max(float(np.abs(whole[name] - start[name]).max()) for name in whole)
    assert max(float(np.abs(states[name] - whole[name]).max()) for name in whole) < 1e-3 * moved


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_an_adapter_trained_from_states_is_that_trained_from_tokens(
    config: Any, tiny_base: Base, tmp_path: Path
) -> None:
    base = family(config, tmp_path, tiny_base.folder / "tokenizer.json")
    assert_same_training(torchengine.classifier(base, 3, configuration(base, rank=2, alpha=4, layers=1)))


@pytest.mark.parametrize("method", ["dora", "adalora", "loha", "vera", "ia3", "ln_tuning", "beft", "bottleneck_relu"])
def test_every_method_at_layers_trains_from_states(method: MethodName, tiny_base: Base, tmp_path: Path) -> None:
    base = family(RobertaConfig(pad_token_id=0, **SMALL), tmp_path, tiny_base.folder / "tokenizer.json")
    trainer = torchengine.classifier(base, 3, configuration(base, method, rank=2, alpha=4, layers=2))
    assert_same_training(trainer)
    numbers = {spec.name.split("layer.")[1][0] for spec in trainer.layout.tensors if "layer." in spec.name}
    assert numbers == {"1", "2"}


def test_a_language_model_trains_from_states(llama: Base) -> None:
    config = configuration(llama, rank=2, alpha=4, layers=1)
    assert config.layers_to_transform == (1,)
    assert_same_training(torchengine.language(llama, config), ())


def test_logits_and_embeddings_are_those_of_the_whole_model(tiny_base: Base) -> None:
    config = configuration(tiny_base, layers=1)
    trainer = torchengine.classifier(tiny_base, 3, config)
    engine: Any = trainer.engine
    adapter, results = trained(trainer, first(trainer)), []
    for kept in (engine._frozen, None):
        engine._frozen = kept
        results.append([trainer.logits(adapter, TEXTS), trainer.embed(TEXTS, adapter), trainer.embed(TEXTS)])
    for states, whole in zip(*results, strict=True):
        np.testing.assert_allclose(states, whole, atol=1e-5)


def test_states_do_not_depend_on_other_texts(tiny_base: Base) -> None:
    engine: Any = torchengine.classifier(tiny_base, 3, configuration(tiny_base, layers=1)).engine
    tokens = [(5, 6, 7), (8, 9), (7, 6, 5), (4, 4, 4)]
    together = engine._frozen.states(tokens, together=True)
    assert [row.shape for row in together] == [(len(text), 32) for text in tokens]
    for text, states, grouped in zip(tokens, engine._frozen.states(tokens), together, strict=True):
        np.testing.assert_array_equal(engine._frozen.states([text])[0], states)
        np.testing.assert_allclose(grouped, states, atol=1e-6)


def test_states_that_were_shared_are_not_computed_again(tiny_base: Base, tmp_path: Path) -> None:
    config, others = configuration(tiny_base, layers=1), tmp_path / "others"
    alone: Any = torchengine.classifier(tiny_base, 3, config)
    alone.engine.share_states(alone.tokens(TEXTS), tmp_path / "states")
    sharing: Any = torchengine.classifier(replace(tiny_base, states=tmp_path / "states"), 3, config)
    sharing.engine._frozen.states = lambda tokens: pytest.fail("computes")
    np.testing.assert_allclose(sharing.embed(TEXTS), alone.embed(TEXTS), atol=1e-3)
    other: Any = torchengine.classifier(replace(tiny_base, digest="other"), 3, config)
    other.engine.share_states(other.tokens(TEXTS), others)
    unlike: Any = torchengine.classifier(replace(tiny_base, states=others), 3, config)  # computes
    np.testing.assert_array_equal(unlike.embed(TEXTS), alone.embed(TEXTS))


def test_a_family_that_mixes_padding_into_a_text_computes_from_tokens(tiny_base: Base, tmp_path: Path) -> None:
    base = family(FNetConfig(**SMALL), tmp_path, tiny_base.folder / "tokenizer.json")
    engine: Any = torchengine.classifier(base, 3, configuration(base, targets=["dense"], layers=1)).engine
    assert engine.config.layers_to_transform == (2,)
    assert engine._frozen is None


@pytest.mark.parametrize("layers", [(7,), (1, 0), (1, 1), (2000,)])
def test_layers_that_the_base_lacks_or_in_another_order_are_refused(layers: tuple[int, ...], tiny_base: Base) -> None:
    with refused(ConfigError, "layers_to_transform"):
        classifier.build(tiny_base, 3, PeftConfig("LORA", 2, 4, ("query",), layers_to_transform=layers))


def test_targets_by_their_paths_have_frozen_layers_below(tiny_base: Base) -> None:
    engine: Any = torchengine.classifier(tiny_base, 3, PeftConfig.lora(2, 4, ("layer.1.output.dense",))).engine
    assert [len(row) for row in engine._frozen.states([(5, 6, 7)])] == [3]
    engine = torchengine.classifier(tiny_base, 3, PeftConfig("LN_TUNING", 0, 0, ("LayerNorm",))).engine
    assert engine._frozen is None


def test_all_layers_are_adapted_unless_layers_are_named(tiny_base: Base) -> None:
    assert configuration(tiny_base).layers_to_transform == ()
    engine: Any = torchengine.classifier(tiny_base, 3, configuration(tiny_base)).engine
    assert engine._frozen is None
    assert configuration(tiny_base, layers=9).layers_to_transform == (0, 1)
