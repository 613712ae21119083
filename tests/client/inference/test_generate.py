"""A generator writes what torch writes, piece by piece, and stays usable after an interruption or error."""

import importlib
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
import torch

from aggregation.errors import ConfigError, DataError, EdgeAdaptError, TrustError
from aggregation.pki.identity import IdentityKey
from client.inference.engine import GenerationEngine
from client.inference.generate import ChatMessage, Generator
from client.inference.library import Composition, Library, Named
from client.inference.session import ClassificationSession
from client.inference.text import Finish, SamplingParams, StopFilter
from export.bundle.write import write_bundle
from export.causal import export_causal
from export.onnx.exported import Profile
from tests.support import refused

PROMPT = "turn on the light"
SHORT = SamplingParams(max_tokens=12)


def written(
    generator: Generator, adapter: Named | None = None, text: str = PROMPT, params: SamplingParams = SHORT
) -> str:
    return "".join(generator.complete(text, params, adapter))


def decoded(engine: GenerationEngine, tokens: Iterable[int]) -> str:
    decoder = engine.decoder()
    return "".join(decoder.decode(token) for token in tokens)


def by_torch(model: Any, engine: GenerationEngine, count: int = 12, **options: Any) -> str:
    ids = engine.encode(PROMPT)
    given = {"attention_mask": torch.ones(1, len(ids)), "do_sample": False, "max_new_tokens": count} | options
    with torch.no_grad():
        sequence = model.generate(torch.tensor([ids]), **given)[0].tolist()
    return decoded(engine, sequence[len(ids) :])


def test_the_text_is_that_of_torch_with_each_adapter_and_without(
    generator: Generator, engine: GenerationEngine, lm_model: Callable[[int, int], Any]
) -> None:
    found = {}
    for name, rank, seed in (("global", 4, 1), ("anna", 6, 2)):
        model = lm_model(rank, seed)
        assert generator.load(name).rank == rank
        found[name] = written(generator, name)
        assert found[name] == by_torch(model, engine)
    with model.disable_adapter():
        found["base"] = written(generator)
        assert found["base"] == by_torch(model, engine)
    assert len(set(found.values())) == 3
    assert written(generator, "global") == found["global"]


@pytest.mark.parametrize(
    ("params", "options"),
    [
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"beams": 4}, {"num_beams": 4, "early_stopping": True}),
    ],
    ids=["penalty", "beams"],
)
def test_beams_and_a_repetition_penalty_write_as_in_torch(
    generator: Generator,
    engine: GenerationEngine,
    lm_model: Callable[[int, int], Any],
    params: dict[str, Any],
    options: dict[str, Any],
) -> None:
    found = written(generator, "global", params=replace(SHORT, **params))
    assert found == by_torch(lm_model(4, 1), engine, **options)
    assert found != written(generator, "global")
    assert generator.last is not None
    assert (generator.last.finish, generator.last.tokens) == (Finish.LENGTH, SHORT.max_tokens)


def test_a_prompt_is_read_in_pieces_and_answered_as_by_torch(
    generator: Generator, engine: GenerationEngine, lm_model: Callable[[int, int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.inference.engine.PIECE", 5)
    assert written(generator, "global") == by_torch(lm_model(4, 1), engine)
    assert generator.last is not None
    assert generator.last.prompt_tokens == len(PROMPT) == 17
    reader = generator._engine
    reader.forget()
    reader.read(reader.encode(PROMPT), SHORT, None)
    assert reader._live is not None
    assert reader._live.inner.get_output("logits").shape[1] == 17 % 5, "only the last piece's logits are kept"
    beams = by_torch(lm_model(4, 1), engine, num_beams=4, early_stopping=True)
    assert written(generator, "global", params=replace(SHORT, beams=4)) == beams


def test_beams_read_the_whole_prompt_and_end_where_the_model_ends_the_answer(
    generator: Generator, engine: GenerationEngine
) -> None:
    params = SamplingParams(max_tokens=230, beams=3)
    first = written(generator, "global", params=params)
    assert generator.last is not None
    whole = generator.last
    assert written(generator, "global", params=params) == first
    assert generator.last.reused_tokens == 0
    assert (whole.finish is Finish.END) == (whole.tokens < params.max_tokens)
    ended = len(engine.encode(first)) if whole.finish is Finish.END else whole.tokens
    assert ended == whole.tokens - (whole.finish is Finish.END)


def test_pieces_come_one_by_one_and_join_to_the_answer(generator: Generator) -> None:
    pieces = list(generator.complete(PROMPT, SHORT))
    last = generator.last
    assert last is not None
    assert len(pieces) > 3
    assert last.text == "".join(pieces)
    assert (last.tokens, last.finish, last.prompt_tokens) == (12, Finish.LENGTH, len(PROMPT))


def test_an_answer_ends_where_the_model_ends_it(generator: Generator, engine: GenerationEngine) -> None:
    # The tiny model never ends by itself: the third token that it writes is declared an end.
    engine.read(engine.encode(PROMPT), SHORT, None)
    tokens = list(engine.draw())
    engine.ends = frozenset([tokens[2]])
    assert written(generator) == decoded(engine, tokens[:2])
    assert generator.last is not None
    assert (generator.last.finish, generator.last.tokens) == (Finish.END, 3)


def test_a_stop_string_ends_an_answer_and_is_not_part_of_it(generator: Generator) -> None:
    whole = written(generator)
    stop = whole[4:7]
    assert written(generator, params=replace(SHORT, stop=(stop, "never"))) == whole[: whole.index(stop)]
    assert generator.last is not None
    assert generator.last.finish is Finish.STOP


def test_closing_an_answer_ends_it_and_does_not_change_the_next(generator: Generator) -> None:
    whole = written(generator)
    pieces = generator.complete(PROMPT, SHORT)
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert generator.last is not None
    assert (generator.last.finish, generator.last.text) == (Finish.INTERRUPTED, first)
    assert written(generator) == whole


def test_an_interruption_within_a_token_leaves_the_generator_usable(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = written(generator)

    def interrupted(*_args: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StopFilter, "feed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            written(generator)
    assert written(generator) == whole


def test_equal_seeds_give_equal_answers_and_another_seed_another(generator: Generator) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.5, seed=1)
    one = written(generator, params=params)
    assert written(generator, params=params) == one
    assert written(generator, params=replace(params, seed=2)) != one


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 0.001}])
def test_sampling_from_the_most_likely_token_only_is_greedy(generator: Generator, narrow: dict[str, Any]) -> None:
    greedy = written(generator)
    assert written(generator, params=replace(SHORT, **{"temperature": 1.0, "seed": 5, **narrow})) == greedy


def test_a_message_after_an_answer_reads_only_the_new_tokens(lm_bundle: Path, generator: Generator) -> None:
    turns = [ChatMessage("user", "lock")]
    answers, reused = [], []
    for text in ("the door", "and the light", "play"):
        answers.append("".join(generator.answer(turns, SHORT)))
        reused.append(generator.last.reused_tokens if generator.last else 0)
        fresh = Generator.open(lm_bundle, threads=1)
        assert "".join(fresh.answer(turns, SHORT)) == answers[-1]
        turns += [ChatMessage("assistant", answers[-1] or "x"), ChatMessage("user", text)]
    assert reused[0] == 0
    assert all(number > 10 for number in reused[1:])


def test_the_cache_of_another_adapter_or_of_other_parameters_is_not_reused(generator: Generator) -> None:
    for adapter in ("global", "anna", None):
        written(generator, adapter)
        assert generator.last is not None
        assert generator.last.reused_tokens == 0
    written(generator)
    assert generator.last.reused_tokens == len(PROMPT) - 1
    written(generator, params=replace(SHORT, temperature=1.0, seed=1))
    assert generator.last.reused_tokens == 0


def test_a_text_as_long_as_the_context_is_refused_and_a_shorter_one_answered_to_its_end(generator: Generator) -> None:
    with refused(DataError, "prompt", value=256):
        generator.complete("a" * 256, SHORT)
    written(generator, text="a" * 250)
    assert generator.last is not None
    assert (generator.last.tokens, generator.last.finish) == (6, Finish.LENGTH)


def test_another_call_while_an_answer_is_written_is_refused(generator: Generator) -> None:
    whole = written(generator, "global")
    pieces = generator.complete(PROMPT, SHORT, "global")
    said = next(pieces)
    for act in (lambda: generator.load("anna"), lambda: generator.complete(PROMPT)):
        with refused(ConfigError, "answer"):
            act()
    assert said + "".join(pieces) == whole


def test_an_adapter_that_was_evicted_is_unloaded_and_can_be_loaded_again(
    lm_bundle: Path, engine: GenerationEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(Library.open(lm_bundle, None), engine, loaded=1, loaded_bytes=2**20)
    unloaded: list[str] = []
    unload = engine.unload
    monkeypatch.setattr(engine, "unload", lambda name: (unloaded.append(name), unload(name)))
    texts = []
    for name in ("global", "anna", "global"):
        texts.append(written(generator, name))
    assert texts[0] == texts[2] != texts[1]
    assert unloaded == ["global", "anna"]
    with pytest.raises(RuntimeError):
        unload("anna")


def test_an_interruption_while_an_adapter_is_loaded_leaves_its_name_free(
    lm_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted: list[str] = []

    class Interrupted(og.Adapters):  # type: ignore[misc]
        def load(self, path: str, name: str) -> None:
            super().load(path, name)
            if name == "anna" and not interrupted:
                interrupted.append(name)
                raise KeyboardInterrupt

    monkeypatch.setattr(og, "Adapters", Interrupted)
    generator = Generator.open(lm_bundle, threads=1)
    before = written(generator, "global")
    with pytest.raises(KeyboardInterrupt):
        generator.load("anna")
    assert written(generator, "global") == before
    assert generator.load("anna").name == "anna"


def test_a_switch_after_the_first_use_takes_less_than_a_millisecond(generator: Generator) -> None:
    for name in ("global", "anna"):
        generator.load(name)
    times = []
    for name in ("global", "anna") * 50:
        start = time.perf_counter()
        generator.load(name)
        times.append(time.perf_counter() - start)
    assert float(np.median(times)) < 1e-3


def test_a_generator_is_freed_before_the_next_one_is_made(
    generator: Generator, engine: GenerationEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(generator, "global")
    assert engine._live is not None
    first, made, make = weakref.ref(engine._live.inner), [], engine._new
    monkeypatch.setattr(engine, "_new", lambda *given: made.append(first()) or make(*given))
    written(generator)  # the bare base needs another one
    assert made == [None], "two KV caches were in memory"


def test_after_its_inner_generator_was_used_an_engine_reads_the_whole_prompt(
    lm_bundle: Path, engine: GenerationEngine
) -> None:
    params = SamplingParams(max_tokens=8)
    engine.load(Library.open(lm_bundle, None).load(Composition.parse("global")))
    prompt = engine.encode(PROMPT)
    engine.read(prompt, params, "global")
    expected = list(engine.draw())
    inner = engine.inner(params, "global")
    inner.rewind_to(0)
    inner.append_tokens(np.array(prompt[::-1], np.int32))
    assert engine.read(prompt, params, "global") == 0
    assert list(engine.draw()) == expected


def test_the_temporary_file_of_an_adapter_is_private_and_removed_after_loading(
    lm_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t").mkdir()
    modes: list[tuple[int, int]] = []

    class Watching(og.Adapters):  # type: ignore[misc]
        def load(self, path: str, name: str) -> None:
            modes.append((Path(path).stat().st_mode & 0o777, Path(path).parent.stat().st_mode & 0o777))
            super().load(path, name)

    monkeypatch.setattr(og, "Adapters", Watching)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    generator = Generator.open(lm_bundle, threads=1)
    generator.load("global")
    assert modes == [(0o600, 0o700)]
    assert list((tmp_path / "t").iterdir()) == []
    assert written(generator)


def test_a_model_without_a_chat_template_does_not_chat(
    tmp_path: Path, make_lm: Any, lm_source: Any, vendor: IdentityKey
) -> None:
    exported = export_causal(make_lm(), ("q_proj",), Profile.FP32)
    write_bundle(tmp_path / "plain", exported, [], key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    generator = Generator.open(tmp_path / "plain", threads=1)
    with refused(ConfigError, "chat_template"):
        generator.answer([ChatMessage("user", "hi")])
    assert written(generator)


def test_without_onnxruntime_genai_the_error_names_the_extra(lm_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with refused(ConfigError, "onnxruntime-genai") as caught:
        Generator.open(lm_bundle)
    assert "pip install 'edgeadapt[generate]'" in str(caught.value)


def test_a_base_for_another_task_is_refused(bundle: Path, lm_bundle: Path) -> None:
    with refused(ConfigError, "base.task", value="text-classification"):
        Generator.open(bundle)
    with refused(ConfigError, "base.task", value="text-generation"):
        ClassificationSession.open(lm_bundle)


def test_a_base_that_changes_while_it_is_loaded_is_not_used(lm_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tampering(og.Model):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            (lm_bundle / "base" / "model.onnx.data").touch()

    monkeypatch.setattr(og, "Model", Tampering)
    with pytest.raises(TrustError):
        Generator.open(lm_bundle)


def test_a_full_temporary_folder_is_named_and_changes_no_answer(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_self: object, path: str) -> None:
        raise RuntimeError(f"Failed to write to {path}")

    before = written(generator, "global")
    monkeypatch.setattr("onnxruntime.AdapterFormat.export_adapter", full)
    with refused(EdgeAdaptError, "TMPDIR"):
        generator.load("anna")
    assert written(generator, "global") == before
