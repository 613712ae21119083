"""Answers that are written together are those that each gets alone, whoever begins, ends or fails meanwhile."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.errors import ConfigError, DataError, EdgeAdaptError
from aggregation.pki.identity import IdentityKey
from client.inference import batch
from client.inference.batch import BatchGenerator, DecoderGraph, Row
from client.inference.generate import Generator
from client.inference.guide import Guide, GuideKind
from client.inference.library import Composition, Library
from client.inference.text import Answer, Finish, SamplingParams
from edgeadapt.formats.policy import Policy
from export.bundle.write import add_adapter, write_bundle
from export.causal import export_causal
from export.onnx.exported import Profile
from tests.support import refused, virtual

globals().update(virtual.FIXTURES)

ASKED = (
    ("turn on the light", "global", 9),
    ("a", "anna", 30),
    ("what is the time in this other town, and is it late", "anna+global:0.5", 3),
    ("play it", None, 17),
    ("x" * 100, "global", 12),  # in more than one piece
    ("turn off", "anna", 1),
    ("is it late", "global", 25),
)


def opened(bundle: Path) -> BatchGenerator:
    return BatchGenerator.of(Library.open(bundle, None), 1, 16, 2**24)


def ask(model: BatchGenerator, text: str, adapter: str | None, tokens: int = 8, owner: str = "", **params: Any) -> Row:
    row = model.begin(text, SamplingParams(tokens, **params), adapter and Composition.of(adapter), owner)
    model.add(row)
    return row


def alone(bundle: Path, asked: Sequence[tuple[str, str | None, int]] = ASKED) -> list[str]:
    generator = Generator.open(bundle, threads=1)
    return ["".join(generator.complete(text, SamplingParams(tokens), adapter)) for text, adapter, tokens in asked]


def step(model: BatchGenerator, written: dict[Row, list[Any]]) -> None:
    for row, part in model.step():
        written.setdefault(row, []).append(part)


def run(model: BatchGenerator, *rows: Row) -> list[str | EdgeAdaptError]:
    """Write until all have ended; return each row's text, or the error."""
    written: dict[Row, list[Any]] = {}
    while not model.idle:
        step(model, written)
    return [text_of(written[row]) for row in rows]


def text_of(parts: Sequence[Any]) -> str | EdgeAdaptError:
    *pieces, last = parts
    if isinstance(last, EdgeAdaptError):
        return last
    assert isinstance(last, Answer)
    assert "".join(pieces) == last.text
    return last.text


@pytest.mark.parametrize("batches", [True, False])
def test_rows_that_come_and_go_write_what_each_writes_alone(lm_bundle: Path, batches: bool) -> None:
    model, written, rows, most = opened(lm_bundle), dict[Row, list[Any]](), list[Row](), 0
    assert model._graph.batches
    model._graph.batches = batches
    while len(rows) < 3 * len(ASKED) or not model.idle:
        if len(rows) < 3 * len(ASKED):  # one more before each step
            rows.append(ask(model, *ASKED[len(rows) % len(ASKED)], owner=str(len(rows))))
        step(model, written)
        most = max(most, model.writing)
    assert most > 4
    assert [text_of(written[row]) for row in rows] == 3 * alone(lm_bundle)


def test_more_rows_than_places_wait(lm_bundle: Path) -> None:
    model = opened(lm_bundle)
    rows = [ask(model, *ASKED[number % len(ASKED)]) for number in range(6 * len(ASKED))]
    assert run(model, *rows) == 6 * alone(lm_bundle)


def test_who_has_the_fewest_places_is_next(lm_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "ROWS", 2)
    model, written = opened(lm_bundle), dict[Row, list[Any]]()
    rows = [ask(model, "play", None, owner=name) for name in ("a", "a", "a", "b")]
    for row in rows:
        model.add(row)
    while not model.idle:
        step(model, written)
    assert [rows.index(row) for row in written] == [0, 3, 1, 2]


def test_the_memory_of_the_cache_limits_the_rows(lm_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, width, bytes
    monkeypatch.setattr(batch, "MAX_CACHE", 4 * 256 * token)
    model, most = opened(lm_bundle), 0
    rows = [ask(model, *one) for one in ASKED]
    assert model._graph._bytes == token
    written: dict[Row, list[Any]] = {}
    while not model.idle:
        step(model, written)
        most = max(most, model.writing)
    assert most == 4
    assert [text_of(written[row]) for row in rows] == alone(lm_bundle)
    monkeypatch.setattr(batch, "GROWTH", 16)
    model = opened(lm_bundle)
    short, long = ask(model, "a", "anna", 30), ask(model, "b" * 150, "global", 100)
    after = [ask(model, "a", "anna", 20) for _ in range(20)]
    found = run(model, short, long, *after)
    assert found == alone(lm_bundle, [("a", "anna", 30), ("b" * 150, "global", 100), *[("a", "anna", 20)] * 20])
    assert len(model._places) == batch.ROWS  # as before the long one


def test_one_who_hangs_up_leaves_the_others_their_answers(lm_bundle: Path) -> None:
    model, written = opened(lm_bundle), dict[Row, list[Any]]()
    rows = [ask(model, *one) for one in ASKED]
    reading, waits = rows[4], rows[6]
    while model._reading is None or model._row(model._reading) is not reading:
        step(model, written)
    for row in (rows[1], reading, waits):
        row.gone = True
    while not model.idle:
        step(model, written)
    kept = [0, 2, 3, 5]
    assert [text_of(written[rows[at]]) for at in kept] == [alone(lm_bundle)[at] for at in kept]
    assert not any(isinstance(part, Answer) for row in (rows[1], reading) for part in written.get(row, []))


def test_a_prompt_that_goes_on_is_read_from_the_cache_of_the_same_tenant_and_adapter(lm_bundle: Path) -> None:
    model = opened(lm_bundle)
    run(model, ask(model, "turn on", "anna", owner="one"))
    for owner, adapter, reused in (("two", "anna", 0), ("one", "global", 0), ("one", "anna", 7)):
        row = ask(model, "turn on the light", adapter, owner=owner)
        assert run(model, row) == alone(lm_bundle, [("turn on the light", adapter, 8)])
        assert row.draft.answer.reused_tokens == reused
    longer = ask(model, "turn on the light", "anna", 200, owner="one")
    assert run(model, longer) == alone(lm_bundle, [("turn on the light", "anna", 200)])


def test_a_row_that_fails_harms_no_other(
    lm_bundle: Path, lm_source: Any, vendor: IdentityKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = lm_source("bad")
    bad = replace(bad, tensors={name: value * np.float32(1e19) for name, value in bad.tensors.items()})
    add_adapter(lm_bundle, bad.adapter_inputs, bad, key=vendor, form="fp32")
    model = opened(lm_bundle)
    rows = [ask(model, *one) for one in ASKED]
    failing = ask(model, "ab", "bad")
    write, calls = DecoderGraph.write, []

    def fails_once(self: DecoderGraph, *given: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise RuntimeError("no memory")
        return write(self, *given)

    monkeypatch.setattr(DecoderGraph, "write", fails_once)
    *found, error = run(model, *rows, failing)
    assert found == alone(lm_bundle)
    assert isinstance(error, DataError)
    assert error.about == "logits"


def test_guides_seeds_and_stops_are_each_rows_own(lm_bundle: Path) -> None:
    model = opened(lm_bundle)
    guide = Guide(GuideKind.JSON_SCHEMA, json.dumps({"enum": ["on", "off"]}))
    first = alone(lm_bundle, [("ab", "anna", 20)])[0]
    sampled = {"temperature": 2.0, "top_p": 0.9}
    once = run(model, ask(model, "ab", "anna", 20, seed=3, **sampled))
    rows = [
        ask(model, "ab", "global", 80, guide=guide, temperature=1.0, seed=1),
        ask(model, "ab", "anna", 20, stop=(first[5],)),
        *(ask(model, "ab", "anna", 20, seed=seed, **sampled) for seed in (3, 3, 4)),
    ]
    valid, stopped, *drawn = run(model, *rows)
    assert json.loads(str(valid)) in ("on", "off")
    assert stopped == first[: first.index(first[5])]
    assert rows[1].draft.finish is Finish.STOP
    assert drawn[0] == drawn[1] == once[0] != drawn[2]
    with refused(ConfigError, "guide"):
        ask(model, "ab", "anna", guide=Guide(GuideKind.REGEX, "("))


def test_the_policy_withholds_what_it_blocks(lm_bundle: Path, lm_source: Any, vendor: IdentityKey) -> None:
    first = alone(lm_bundle, [("ab", "anna", 20)])[0]
    letter = next(char for char in first if char.isalnum() and char.lower() == char)
    given = replace(lm_source(), version=9, policy=Policy(input=("secret",), output=(letter,), denied="No."))
    add_adapter(lm_bundle, given.adapter_inputs, given, key=vendor, form="fp32")
    model = opened(lm_bundle)
    rows = [ask(model, "ab", "anna", 20), ask(model, "a Secret", "anna", 20)]
    assert run(model, *rows) == ["No.", "No."]
    assert [row.draft.finish for row in rows] == [Finish.BLOCKED] * 2
    assert [row.draft.tokens for row in rows] == [20, 0]


@pytest.mark.parametrize("text", ["", "a" * 256])
def test_what_cannot_be_answered_is_refused_before_it_waits(lm_bundle: Path, text: str) -> None:
    model = opened(lm_bundle)
    with refused(DataError, "text" if not text else "prompt"):
        ask(model, text, "anna")
    assert model.idle


def test_virtual_tokens_and_other_methods_run_one_after_the_other(virtual_bundle: Path) -> None:
    model = opened(virtual_bundle)
    assert not model._graph.batches
    asked = [("turn on", name, 10) for name in (*virtual.METHODS, "lora", None)]
    assert run(model, *(ask(model, *one) for one in asked)) == alone(virtual_bundle, asked)


@pytest.mark.parametrize("kind", ["web-int8", "traced"])
def test_a_graph_whose_rows_depend_on_each_other_runs_one_after_the_other(
    kind: str, lm_base: Any, make_lm: Any, lm_source: Any, vendor: IdentityKey, tmp_path: Path
) -> None:
    targets, settings = ("q_proj", "v_proj"), {"sliding_window": 8, "max_position_embeddings": 256}
    base = lm_base if kind == "web-int8" else make_lm("mistral", **settings)
    profile = Profile.WEB_INT8 if kind == "web-int8" else Profile.FP32
    exported = export_causal(base, targets, profile, max_rank=16)
    write_bundle(tmp_path / "lm", exported, [lm_source(), lm_source("anna", 6, 2)], key=vendor, form="fp32")
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    model = opened(tmp_path / "lm")
    assert not model._graph.batches
    assert run(model, *(ask(model, *one) for one in ASKED)) == alone(tmp_path / "lm")


def test_a_sample_has_the_probabilities_of_its_parameters() -> None:
    logits, rng, count = np.log(np.array([1, 4, 2, 3], np.float32)), np.random.default_rng(0), 4000

    def shares(**params: Any) -> Any:
        given = SamplingParams(**params)
        return np.bincount([given.sample(logits, rng) for _ in range(count)], minlength=4) / count

    assert SamplingParams().sample(logits, rng) == 1
    for params, expected in (
        ({"temperature": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"temperature": 1.0, "top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"temperature": 1.0, "top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
    ):
        np.testing.assert_allclose(shares(**params), expected, atol=0.03)
