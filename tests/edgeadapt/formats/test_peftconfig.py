import re
import time
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from pydantic_core import SchemaError

from aggregation.errors import ConfigError, DataError
from edgeadapt.formats import jsontext
from edgeadapt.formats.peftconfig import PeftConfig, require_trainable
from tests.support import refused

PLAIN = PeftConfig("LORA", 8, 16, ("query",))


def test_without_patterns_every_layer_is_scaled_alike() -> None:
    assert PLAIN.scaling_of("layer.0.query") == 2.0
    assert PLAIN.rank_of("layer.0.query") == 8


def test_the_first_pattern_that_matches_counts() -> None:
    method = PeftConfig("LORA", 8, 16, ("query",), rank_pattern=(("query", 2), (r"layer\.0\.query", 4)))
    assert method.rank_of("layer.0.query") == 2


def test_a_pattern_matches_the_end_of_a_path_from_a_dot_on() -> None:
    method = PeftConfig("LORA", 8, 16, ("query",), alpha_pattern=(("0.query", 32),))
    assert [method.alpha_of(path) for path in ("layer.0.query", "layer.10.query", "0.query", "0.query.x")] == [
        *(32, 16, 32, 16)
    ]


def test_rank_stabilized_scaling_divides_by_the_root_of_the_layers_own_rank() -> None:
    method = PeftConfig("LORA", 4, 8, ("query",), rank_pattern=(("query", 16),), use_rslora=True)
    assert method.scaling_of("query") == 8 / 4


def test_a_pattern_that_is_no_regular_expression_and_a_rank_of_zero_are_refused() -> None:
    with refused(DataError, "pattern", value="("):
        PeftConfig("LORA", 8, 16, ("query",), rank_pattern=(("(", 2),)).rank_of("query")
    with refused(DataError, "query"):
        PeftConfig("LORA", 8, 16, ("query",), rank_pattern=(("query", 0),)).scaling_of("query")


@pytest.mark.parametrize("pattern", ["(.*)*x" * 10, "(a|b|ab)*c", "(.*.*.*.*.*.*.*.*)z", "(a?){60}a{60}"])
def test_no_pattern_takes_long(pattern: str) -> None:
    path = "ab" * 40
    before = time.perf_counter()
    assert PeftConfig("LORA", 8, 16, ("query",), rank_pattern=((pattern, 2),)).rank_of(path) == 8
    assert time.perf_counter() - before < 1


@pytest.mark.parametrize(
    ("pattern", "cause"),
    [
        ("a{99999999999}", OverflowError),
        ("(?i)query", re.error),
        ("(?!x)query", SchemaError),
        (r"(q)\3", SchemaError),
        ("[a[b]]", type(None)),
        (r"\<query", type(None)),
        ("(.{9999}){9999}", SchemaError),
    ],
)
def test_an_unsound_pattern_or_one_of_unbounded_time_is_refused_by_name(pattern: str, cause: type) -> None:
    with refused(DataError, "pattern") as caught:
        PeftConfig("LORA", 8, 16, ("query",), alpha_pattern=((pattern, 2),)).alpha_of("layer.0.query")
    assert type(caught.value.__cause__) is cause


PATH = st.text("abq._01", max_size=12)
PARTS = st.sampled_from(
    [
        "a",
        "b",
        "q",
        "_",
        "0",
        ".",
        r"\.",
        r"\d",
        r"\w",
        ".*",
        "a+",
        "b?",
        "[ab]",
        "[^a.]",
        "(a|b)",
        "(?:q|_)*",
        "a{2}",
        "^",
        "$",
    ]
)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@settings(max_examples=400, deadline=None)
@given(st.lists(PARTS, min_size=1, max_size=5).map("".join), PATH)
def test_a_pattern_matches_what_it_matches_to_python(pattern: str, path: str) -> None:
    found = PeftConfig("LORA", 8, 16, ("q",), rank_pattern=((pattern, 2),)).rank_of(path)
    assert (found == 2) == bool(re.match(rf"(.*\.)?({pattern})$", path))


def test_the_signed_form_keeps_the_order_of_patterns_and_whole_alphas_whole() -> None:
    method = PeftConfig("LORA", 8, 16, ("q",), (("b", 1), ("a", 2)), (("z", 3), ("y", 0.5)), True)
    found = TypeAdapter(PeftConfig).validate_json(jsontext.encode(asdict(method)), strict=True)
    assert found == method
    assert isinstance(found.lora_alpha, int)
    assert hash(found) == hash(method)


@pytest.mark.parametrize("change", [{"x": 1}, {"peft_type": "LOKR"}], ids=["field", "peft_type"])
def test_an_unknown_field_or_peft_type_is_refused(change: dict[str, Any]) -> None:
    body = jsontext.encode(asdict(PLAIN) | change)
    with pytest.raises(ValidationError):
        TypeAdapter(PeftConfig).validate_json(body, strict=True)


IA3 = PeftConfig("IA3", 0, 0, ("key", "dense"), feedforward_modules=("dense",))
LOHA, VERA = PeftConfig("LOHA", 8, 8, ("query",)), PeftConfig("VERA", 256, 0, ("query",))
PROMPT = PeftConfig("PROMPT_TUNING", 0, 0, (), num_virtual_tokens=20)
TRAINABLE = {
    "lora": PLAIN,
    "rslora": replace(PLAIN, use_rslora=True),
    "dora": replace(PLAIN, use_dora=True),
    "biases": replace(PLAIN, bias="all"),
    "biases of targets": replace(PLAIN, bias="lora_only", use_dora=True),
    "adalora": PeftConfig("ADALORA", 8, 16, ("query",)),
    "loha": LOHA,
    "vera": VERA,
    "ia3": IA3,
    "norms": PeftConfig("LN_TUNING", 0, 0, ("LayerNorm",)),
    "beft": PeftConfig("BEFT", 0, 0, ("value",)),
    "bottleneck": PeftConfig("BOTTLENECK", 4, 0, ("output.dense",)),
    "prompt": PROMPT,
    "p-tuning": replace(PROMPT, peft_type="P_TUNING"),
    "prefix": replace(PROMPT, peft_type="PREFIX_TUNING"),
}


@pytest.mark.parametrize("name", TRAINABLE)
def test_each_method_can_be_trained_with_the_settings_that_it_reads(name: str) -> None:
    require_trainable(TRAINABLE[name])


@pytest.mark.parametrize(
    ("config", "about"),
    [
        (replace(PLAIN, rank_pattern=(("query", 4),)), "rank_pattern"),
        (replace(PLAIN, alpha_pattern=(("query", 4),)), "alpha_pattern"),
        (replace(PLAIN, lora_alpha=0.5), "lora_alpha"),
        (replace(PLAIN, lora_alpha=0), "lora_alpha"),
        (replace(PLAIN, r=0), "r"),
        (replace(PLAIN, r=10**6), "r"),
        (replace(PLAIN, target_modules=()), "target_modules"),
        (replace(PLAIN, feedforward_modules=("query",)), "feedforward_modules"),
        (replace(PLAIN, num_virtual_tokens=1), "num_virtual_tokens"),
        (replace(IA3, bias="all"), "bias"),
        (replace(LOHA, r=33), "r"),
        (replace(LOHA, lora_alpha=0), "lora_alpha"),
        (replace(LOHA, use_rslora=True), "use_rslora"),
        (replace(VERA, r=1025), "r"),
        (replace(VERA, lora_alpha=1), "lora_alpha"),
        (PeftConfig("ADALORA", 8, 16, ("query",), rank_pattern=(("query", 4),)), "rank_pattern"),
        (replace(IA3, r=2), "r"),
        (replace(IA3, use_dora=True), "use_dora"),
        (replace(IA3, target_modules=()), "target_modules"),
        (replace(IA3, feedforward_modules=("output.dense",)), "feedforward_modules"),
        (replace(PROMPT, num_virtual_tokens=0), "num_virtual_tokens"),
        (replace(PROMPT, num_virtual_tokens=10**6), "num_virtual_tokens"),
        (replace(PROMPT, target_modules=("query",)), "target_modules"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_trained_is_refused_by_setting(config: PeftConfig, about: str) -> None:
    with refused(ConfigError, about):
        require_trainable(config)
