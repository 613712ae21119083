"""The trainable view of a frozen encoder: which tensors are the adapter, what they change, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from aggregation.errors import ConfigError
from edgeadapt.formats import files
from edgeadapt.formats.layout import Layout
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.classifier import BATCH, build, in_batches, load, seeded, tensors
from tests.support import refused

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
