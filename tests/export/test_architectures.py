"""docs/reference/methods.md states what happens to each architecture: this file exports each, and compares.

Every base is tiny and random, has slots of every kind at every place, and windows that are shorter than the texts.
"exact" means that torch and ONNX Runtime give equal logits up to ``CLOSE``, without an adapter and with one of each
kind, with and without the cache; "within", that in a quantized base the change by an adapter is off by ``LIMITS``.
"""

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from aggregation.errors import ConfigError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base, find_base
from edgeadapt.formats.graphinputs import with_placeholders
from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.methods.peft.inputs import is_saved
from export.causal import base as causal_base
from export.causal import builder, export_causal, traced
from export.onnx.classifier import export_classifier
from export.onnx.dequantize import BITS, round_weights
from export.onnx.exported import ExportedBase, Profile
from export.onnx.peftmodel import replace_conv1d
from export.onnx.slotted import with_own_head
from export.onnx.targets import ALL, SlotKind, Slots
from tests.support.exhaustive import few
from tests.support.models import MakeLm
from tests.support.processor import saturates
from tests.support.slotkinds import KINDS, TOKENS, by_torch, drawn

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "methods.md"
CLOSE = 2e-5  # of the largest logit
# In place of CLOSE: with the random adapter, float32 is off by 4e-5 from double precision here, and by 1.4e-5 in torch.
LOOSE = {"gpt_oss": 1e-4}
# How far the change of the logits may be off that an adapter makes, as a share of that change; 1 without any effect.
LIMITS = {Profile.NATIVE_INT8: 0.2, Profile.NATIVE_INT4: 0.3, Profile.WEB_INT8: 0.8 if saturates() else 0.3}
AFTER_VIRTUAL = (SlotKind.PROMPT, SlotKind.PREFIX)
LENGTH, FIRST = 20, 7  # tokens of a text, and how many of them are read at once
ONE, TWO = {"num_hidden_layers": 1}, {"num_hidden_layers": 2}
WINDOW = TWO | {"sliding_window": 4}
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = ONE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4}
OF_ONE_LAYER = (
    "apertus arcee biogpt bitnet bloom cohere ernie4_5 exaone gemma glm glm4 gpt2 gpt_bigcode granite "
    "granitemoe helium hunyuan_v1_dense jamba llama mamba nemotron olmo olmo2 persimmon phi phi3 qwen2 "
    "qwen3 qwen3_next smollm3 stablelm"
)
# Keys of the configuration that differ from ``make_lm``'s.
GENERATION: dict[str, dict[str, Any]] = dict.fromkeys(OF_ONE_LAYER.split(), ONE) | {
    "codegen": ONE | {"rotary_dim": 8},
    "cohere2": MIXED,
    "ctrl": ONE | {"dff": 96},
    "exaone4": MIXED,
    "falcon": ONE | {"head_dim": ...},
    "gemma2": WINDOW,
    "gemma3_text": MIXED,
    "gpt_neo": ONE | {"attention_types": [[["local"], 1]], "window_size": 4},
    "gpt_neox": ONE | {"num_key_value_heads": 4},
    "gpt_oss": WINDOW | LOCAL_EXPERTS,
    "gptj": ONE | {"rotary_dim": 8},
    "lfm2": TWO | {"layer_types": ["conv", "full_attention"]},
    "mistral": WINDOW,
    "mixtral": WINDOW,
    "mpt": {"d_model": 64, "n_layers": 1, "n_heads": 4, "max_seq_len": 64},
    "olmo3": MIXED,
    "olmoe": EXPERTS,
    "opt": ONE | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phimoe": ONE | LOCAL_EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "starcoder2": WINDOW,
    "xglm": ONE | {"ffn_dim": 96},
}


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
OF_USUAL_SIZES = (
    "bert camembert data2vec-text deberta deberta-v2 ernie fnet ibert llama megatron-bert roberta "
    "roberta-prelayernorm xlm-roberta xlm-roberta-xl"
)
# The same, of classifiers, instead of ``SMALL`` where it is not added.
CLASSIFICATION: dict[str, dict[str, Any]] = dict.fromkeys(OF_USUAL_SIZES.split(), SMALL) | {
    "albert": SMALL | {"embedding_size": 16},
    "big_bird": SMALL | {"attention_type": "original_full"},
    "convbert": SMALL | {"embedding_size": 32, "num_groups": 1, "head_ratio": 2},
    "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 40},
    "electra": SMALL | {"embedding_size": 16},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 40, "pad_token_id": 0},
    "longformer": SMALL | {"attention_window": [8]},
    "mobilebert": SMALL | {"embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16},
    "modernbert": SMALL | {"num_hidden_layers": 2, "local_attention": 8},
    "mpnet": SMALL | {"pad_token_id": 1},
    "qwen2": SMALL | {"num_key_value_heads": 2},
    "qwen3": SMALL | {"num_key_value_heads": 2, "head_dim": 8},
    "rembert": SMALL | {"input_embedding_size": 16, "output_embedding_size": 16},
    "roformer": SMALL | {"embedding_size": 32},
    "squeezebert": SMALL | {"embedding_size": 32},
}


def rows(heading: str) -> dict[str, list[str]]:
    """The table for ``heading``: architecture → how it is exported, with what, or why it is refused."""
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## Architectures of {heading}\n")[2].partition("\n## ")[0]
    found: dict[str, list[str]] = {}
    for outcome, what, names in re.findall(r"^\| (\w+) \| (.*?) \| (`.*`) \|$", section, re.M):
        compared = ["exact", what.replace("`", ""), *["within"] * len(LIMITS)]
        path = [] if outcome == "exported" else [outcome]
        cells = ["refused", what.replace("`", "")] if outcome == "refused" else [*path, *compared]
        found |= dict.fromkeys(re.findall("`(.+?)`", names), cells)
    return found


def cells(
    profiles: Mapping[Profile, Mapping[SlotKind | None, float]], refused: Sequence[SlotKind], close: float
) -> list[str]:
    """The cells of a table: what ``fp32`` gives, the kinds that are refused, and what the other profiles give."""
    limits = {Profile.FP32: close} | LIMITS
    found = []
    for profile, limit in limits.items():
        beyond = [f"{kind or 'bare'} {value:.0e}" for kind, value in profiles[profile].items() if not value <= limit]
        found.append(f"off: {', '.join(beyond)}" if beyond else "exact" if profile is Profile.FP32 else "within")
    return [found[0], ", ".join(refused) or "none", *found[1:]]


def exported_with(export: Callable[[frozenset[SlotKind]], ExportedBase]) -> tuple[ExportedBase, list[SlotKind]]:
    """A base with slots of every kind, and the kinds that are refused. Raises ConfigError if the base itself is."""
    try:
        return export(frozenset(KINDS)), []
    except ConfigError:
        export(frozenset({SlotKind.LOW_RANK}))
        refused = [kind for kind in AFTER_VIRTUAL if not _exports(export, kind)]
        with suppress(ConfigError):  # seldom others: a trace for each of these takes seconds
            return export(frozenset(KINDS).difference(refused)), refused
        refused = [kind for kind in KINDS if not _exports(export, kind)]
        if not refused:
            raise
        return export(frozenset(KINDS).difference(refused)), refused


def _exports(export: Callable[[frozenset[SlotKind]], ExportedBase], kind: SlotKind) -> bool:
    try:
        export(frozenset({kind}))
    except ConfigError:
        return False
    return True


def distance(change: Floats, expected: Floats) -> float:
    """How far the change of a token's logits is off, as a share of its length: the median of those that change most.

    Not the mean of all: rounding may send a token of a mixture to other experts, which is no matter of slots.
    """
    length = np.linalg.norm(expected, axis=-1)
    most = length >= length.max() / 2
    return float(np.median(np.linalg.norm(change - expected, axis=-1)[most] / length[most]))


def compared(
    exported: ExportedBase, model: Any, answer: Callable[[Tensors, bool], list[Floats]], expected: Mapping[Any, Floats]
) -> dict[SlotKind | None, float]:
    """By kind of slot, and without an adapter: how far the graph is from torch.

    In ``fp32``, the largest difference as a share of the largest logit. In other profiles, the distance of the change
    that the adapter makes: 1 if a slot has no effect.
    """
    bare = answer({}, False)
    found: dict[SlotKind | None, float] = {}
    for kind, logits in expected.items():
        given = drawn(exported.manifest.slots, kind, model) if kind else {}
        answers = answer(given, kind in AFTER_VIRTUAL) if kind else bare
        if exported.manifest.profile == Profile.FP32:
            found[kind] = max(float(np.abs(each - logits).max() / np.abs(logits).max()) for each in answers)
        elif kind:
            changes = [each - one for each, one in zip(answers, bare, strict=True)]
            found[kind] = max(distance(change, logits - expected[None]) for change in changes)
    return found


def with_each(
    slots: Mapping[str, Sequence[str]], model: Any, ask: Callable[[Tensors], Floats]
) -> dict[SlotKind | None, Floats]:
    """Torch's logits with an adapter of each kind for which the base has a slot, and without."""
    adapters = {kind: drawn(slots, kind, model) for kind in KINDS}
    return {None: ask({})} | {kind: ask(given) for kind, given in adapters.items() if given}


@contextmanager
def traced_once() -> Iterator[list[str]]:
    """Exports within the block share one graph of their base: tracing takes seconds. The value: the path it took."""
    took: list[str] = []
    built: list[builder.DecoderGraph] = []
    decoder, build = causal_base._decoder, traced.build

    def once(base: Base, model: Any, sample: Any, store: Any, report: Any) -> builder.DecoderGraph:
        if not built:
            made = decoder(base, model, sample, store, report)
            for tensor in made.graph.graph.initializer:
                tensor.CopyFrom(numpy_helper.from_array(np.array(store.array(tensor)), tensor.name))
            built.append(made)
        return replace(built[0], graph=copy.deepcopy(built[0].graph))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traced, "build", lambda *given: took.append("traced") or build(*given))
        patch.setattr(causal_base, "_decoder", once)
        yield took


def rounded(model: nn.Module, heads: Mapping[str, Floats]) -> nn.Module:
    """A copy with weights in four bits, apart from the heads that adapters bring: their rounding is no matter of slots.

    In eight bits the weights are close enough to compare with.
    """
    result = copy.deepcopy(model).float()
    replace_conv1d(result)
    round_weights(result, BITS[Profile.NATIVE_INT4])
    with torch.no_grad():
        for name, value in heads.items():
            result.get_parameter(name).copy_(torch.from_numpy(value))
    return result


def generated(base: Base, runner: Any) -> list[str]:
    """The path that a language model took, and the other cells of its row."""
    with traced_once() as took:

        def export(kinds: frozenset[SlotKind], profile: Profile = Profile.FP32) -> ExportedBase:
            return export_causal(base, Slots((ALL,), kinds), profile)

        try:
            exported, refused = exported_with(export)
        except ConfigError as error:
            return ["refused", error.about]
        model = pretrained.load(base, AutoModelForCausalLM)
        ids = np.random.default_rng(0).integers(3, 90, (2, LENGTH))
        cache = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        found = {}
        for profile in (Profile.FP32, *LIMITS):
            if profile is not Profile.FP32:
                exported = export(frozenset(KINDS).difference(refused), profile)
            side = runner(exported)
            if profile is Profile.FP32:
                heads = (side.pasts[0].shape[1], side.pasts[0].shape[3])
                ask = partial(by_torch, ids=ids, heads=heads, cache=cache)
                expected = with_each(exported.manifest.slots, model, partial(ask, model))
                coarse = with_each(exported.manifest.slots, model, partial(ask, rounded(model, {})))

            def answer(given: Tensors, virtual: bool, side: Any = side) -> list[Floats]:
                tokens = np.array([with_placeholders(list(row), TOKENS * virtual) for row in ids])
                firsts = (None, FIRST + TOKENS) if side.exported.manifest.profile == Profile.FP32 else (FIRST + TOKENS,)
                return [side.logits(tokens, given, first)[:, -LENGTH:] for first in firsts]

            found[profile] = compared(exported, model, answer, coarse if profile is Profile.NATIVE_INT4 else expected)
    close = LOOSE.get(pretrained.configuration(base).model_type, CLOSE)
    return ["".join(took) or "builder", *cells(found, refused, close)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", few(GENERATION, "llama", "gpt2"))  # builder and traced path
def test_a_language_model_is_exported_as_the_page_says(make_lm: MakeLm, runner: Any, kind: str) -> None:
    assert generated(make_lm(kind, **GENERATION[kind]), runner) == rows("language models")[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", few(CLASSIFICATION, "distilbert"))
def test_a_classifier_is_exported_as_the_page_says(tmp_path: Path, tiny_base: Base, runner: Any, kind: str) -> None:
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(kind, vocab_size=75, num_labels=3, **CLASSIFICATION[kind])
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tiny_base.folder / "tokenizer.json").read_bytes())
    assert classified(find_base(str(tmp_path)), runner) == rows("classifiers")[kind]


def classified(base: Base, runner: Any) -> list[str]:
    """The cells of a classifier with its own head."""

    def export(kinds: frozenset[SlotKind], profile: Profile = Profile.FP32) -> ExportedBase:
        slots = Slots((ALL,), kinds - {SlotKind.PREFIX})
        if not slots.kinds:
            raise ConfigError("no classifier has a prefix", about="PREFIX_TUNING")  # test_virtual_tokens.py
        return export_classifier(with_own_head(base, slots), base, profile)

    try:
        exported, refused = exported_with(export)
    except ConfigError as error:
        return ["refused", error.about]
    inner: Any = with_own_head(base, [ALL]).model
    model = inner.double()  # float32 of random weights is sometimes less exact than the graph's
    head = {
        name: inner.get_parameter(name).detach().numpy().astype(np.float32)
        for name in exported.manifest.slots
        if is_saved(name)
    }
    ids = np.random.default_rng(0).integers(4, 75, (8, LENGTH))
    ask = partial(by_torch, ids=ids)
    expected = with_each(exported.manifest.slots, model, partial(ask, model))
    coarse = with_each(exported.manifest.slots, model, partial(ask, rounded(model, head)))
    found = {}
    for profile in (Profile.FP32, *LIMITS):
        if profile is not Profile.FP32:
            exported = export(frozenset(KINDS).difference(refused), profile)
        side = runner(exported)

        def answer(given: Tensors, _virtual: bool, side: Any = side) -> list[Floats]:
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **head, **given}
            return [side.session.run(["logits"], feeds)[0]]

        found[profile] = compared(exported, model, answer, coarse if profile is Profile.NATIVE_INT4 else expected)
    return cells(found, refused, CLOSE)


def test_the_page_lists_what_is_compared() -> None:
    assert sorted(rows("language models")) == sorted(GENERATION)
    assert sorted(rows("classifiers")) == sorted(CLASSIFICATION)
