"""``edgeadapt device infer`` and ``adapters`` print answers and listings, and refuse wrong input in one line."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
from click.testing import CliRunner, Result

from aggregation.errors import ConfigError, EdgeAdaptError, TrustError
from aggregation.pki.identity import IdentityKey
from client.cli import device
from client.inference.engine import GenerationEngine
from client.inference.library import Composition, Library
from client.inference.text import SamplingParams
from edgeadapt.cli.convert import convert
from edgeadapt.formats import container
from edgeadapt.formats.bundle import BASE, TOKENIZER, adapter_path
from edgeadapt.formats.manifest import Card
from export.bundle.write import write_bundle
from export.cli import bundle_group
from export.onnx.exported import ExportedBase
from tests.support import refused
from tests.support.bundles import flip, resign
from tests.support.models import Source

Done = subprocess.CompletedProcess[str]


def run(*arguments: str | Path, stdin: str | bytes = "") -> Result:
    group = bundle_group if arguments[0] == "list" else device
    return CliRunner().invoke(group, list(map(str, arguments)), input=stdin)


def lines(*arguments: str | Path) -> list[list[str]]:
    """The words of each line that the command prints."""
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return [line.split() for line in result.output.splitlines()]


def adapters(*arguments: str | Path, stdin: str = "") -> Any:
    """The adapters in the JSON that the command prints."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)["adapters"]


def about(result: Result) -> str:
    """What the error of a command is about."""
    assert isinstance(result.exception, EdgeAdaptError), (result.output, result.exception)
    return result.exception.about


def process(*arguments: str | Path) -> Done:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "edgeadapt", "device", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_phrase_is_answered_with_its_intent_and_probability(bundle: Path) -> None:
    done = process("infer", "--bundle", bundle, "lock the door")
    assert done.returncode == 0, done.stderr
    label, probability = done.stdout.split()
    assert label in ("Light", "Lock", "Music", "Timer")
    assert 25 <= float(probability.rstrip("%")) <= 100


def test_each_line_names_adapter_and_phrase_if_there_are_several(with_anna: Path) -> None:
    found = lines("infer", "--bundle", with_anna, "--adapter", "global", "--adapter", "anna", "unlock", "play music")
    assert [line[2] for line in found] == ["global", "global", "anna", "anna"]
    assert [line[3:] for line in found] == [["unlock"], ["play", "music"]] * 2


def test_phrases_are_read_from_standard_input(bundle: Path) -> None:
    phrases = "lock the door\n\nplay music\n"
    (result,) = adapters("infer", "--bundle", bundle, "--json", "--top", "2", "-", stdin=phrases)
    assert (result["adapter"], result["version"], result["temperature"]) == ("global", 3, 1.0)
    assert [answer["text"] for answer in result["answers"]] == ["lock the door", "play music"]
    assert all(len(answer["intents"]) == 2 for answer in result["answers"])


@pytest.mark.parametrize("text", ["😀 ✨", "\u200b", " "])
def test_a_text_of_unknown_tokens_only_has_no_intent_and_the_others_are_answered(bundle: Path, text: str) -> None:
    (result,) = adapters("infer", "--bundle", bundle, "--json", text, "lock the door", "lock the 😀 door")
    unknown, known, partly = result["answers"]
    assert (unknown["unknown"], unknown["intents"]) == (1, [])
    assert (known["unknown"], len(known["intents"])) == (0, 1)
    assert (partly["unknown"], len(partly["intents"])) == (0.25, 1)
    found = lines("infer", "--bundle", bundle, text, "lock the 😀 door")
    assert found[0][:2] == ["unknown", "text"]
    assert found[1][2:4] == ["(25%", "unknown)"]


def test_a_base_without_marks_labels_no_words(bundle: Path) -> None:
    result = run("infer", "--bundle", bundle, "--words", "turn on the light")
    assert about(result) == "--words"
    assert "base change --mark" in str(result.exception)


def test_the_end_of_a_text_that_is_not_read_is_stated(bundle: Path) -> None:
    limit = json.loads((bundle / BASE / TOKENIZER).read_text())["truncation"]["max_length"]
    texts = ["lock " * size for size in (limit - 2, limit - 1, 1000)]
    (result,) = adapters("infer", "--bundle", bundle, "--json", *texts)
    assert [answer["unread"] for answer in result["answers"]] == [0, 1, 1000 + 2 - limit]
    done = run("infer", "--bundle", bundle, *texts)
    for count, line in zip((1, 1002 - limit), done.stderr.splitlines(), strict=True):
        assert f"the last {count} tokens of 'lock lock" in line
    assert len(done.stdout.splitlines()) == 3


def test_a_person_sees_labels_as_words_and_a_program_as_they_are(
    bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey
) -> None:
    names = ("light_on", "LABEL_0", "_", "Timer")
    write_bundle(bundle, exported, [replace(source(), labels=names, version=9)], key=vendor)
    result = run("infer", "--bundle", bundle, "--top", "4", "unlock")
    shown = {line.rpartition("  ")[0].strip() for line in result.output.splitlines()}
    assert shown == {"light on", "LABEL 0", "_", "Timer"}
    (found,) = adapters("infer", "--bundle", bundle, "--top", "4", "--json", "unlock")
    assert {one["intent"] for one in found["answers"][0]["intents"]} == set(names)


def test_several_adapters_answer_as_one(with_anna: Path) -> None:
    (result,) = adapters("infer", "--bundle", with_anna, "--json", "--adapter", "global:0.5+anna:1", "unlock")
    assert result["adapter"] == "anna+global:0.5"


def test_adapters_are_listed_with_what_was_verified(with_anna: Path) -> None:
    found = lines("list", "--bundle", with_anna)
    assert [line[:4] for line in found] == [["anna", "personal", "version", "3"], ["global", "global", "version", "3"]]
    kinds = [adapter["kind"] for adapter in adapters("list", "--bundle", with_anna, "--json")]
    assert kinds == ["personal", "global"]


def test_the_listing_has_epsilon_and_delta_of_a_global_adapter_or_says_that_nothing_bounds_it(
    with_anna: Path, vendor: IdentityKey
) -> None:
    personal, shared = run("list", "--bundle", with_anna).output.splitlines()
    assert "privacy none" in shared
    assert "privacy" not in personal
    bound = {"epsilon": 6.071, "delta": 1e-6}
    resign(with_anna, vendor, privacy=bound)
    assert "epsilon 6.07 for delta 1e-06 " in run("list", "--bundle", with_anna).output
    assert [each["privacy"] for each in adapters("list", "--bundle", with_anna, "--json")] == [None, bound]


def test_the_listing_has_the_card_of_an_adapter(with_anna: Path, vendor: IdentityKey) -> None:
    card = Card(owner="Zoë", purpose="Lights", data="Volunteers", license="MIT", languages=("de", "en"))
    resign(with_anna, vendor, card=card)
    listed = run("list", "--bundle", with_anna).output.splitlines()
    assert [line.split()[0] for line in listed] == ["anna", "global", "Zoë:"]
    assert listed[2] == "  Zoë: Lights; data: Volunteers; MIT; de, en"
    assert [each["card"] for each in adapters("list", "--bundle", with_anna, "--json")] == [
        None,
        card.model_dump(mode="json"),
    ]


def test_a_listing_names_the_adapters_that_fail_verification_and_fails(with_anna: Path) -> None:
    (with_anna / "adapters" / "anna.onnx_adapter").write_bytes(b"\0")
    result = run("list", "--bundle", with_anna)
    assert about(result) == "bundle.adapters"
    assert str(result.exception) == "1 of 2 adapters failed verification: anna; copy them again"
    assert "anna  refused:" in result.output
    assert "global  global" in result.output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--adapter", "nobody", "unlock"], "'nobody'"), (["--trust", "nowhere.pem", "unlock"], "nowhere.pem")],
)
def test_wrong_input_is_one_line_that_names_it_and_a_failure(bundle: Path, arguments: list[str], named: str) -> None:
    done = process("infer", "--bundle", bundle, *arguments)
    assert done.returncode != 0
    assert named in done.stderr
    assert done.stderr.count("\n") == 1


def test_control_characters_of_a_phrase_are_not_printed(bundle: Path) -> None:
    found = lines("infer", "--bundle", bundle, "\x1b[31mlock", "a\nb")
    assert [line[2:] for line in found] == [["[31mlock"], ["a", "b"]]


def test_a_missing_bundle_and_a_damaged_one_are_refused(bundle: Path, tmp_path: Path) -> None:
    assert about(run("infer", "--bundle", tmp_path / "nowhere", "unlock")) == "bundle"
    (bundle / "base" / "model.onnx").write_bytes(b"")
    done = process("infer", "--bundle", bundle, "unlock")
    assert done.returncode == 4
    assert "model.onnx" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_error_in_json_is_an_object_too(bundle: Path) -> None:
    done = process("infer", "--bundle", bundle, "--json", "--adapter", "nobody", "unlock")
    assert done.returncode != 0
    assert "'nobody'" in json.loads(done.stdout)["error"]


# A converted adapter gives other programs the answers that a device gives.
PROMPT = "turn on the light"
TOKENS = 12


@pytest.fixture
def int8(lm_bundle: Path, lm_exported: ExportedBase, lm_source: Any, vendor: IdentityKey) -> Path:
    """A language model with an adapter in eight bits."""
    write_bundle(lm_bundle, lm_exported, [lm_source()], key=vendor, form="int8")
    return lm_bundle


def convert_to(bundle: Path, out: Path, *arguments: str) -> None:
    convert.main(["--bundle", str(bundle), "--out", str(out), *arguments], standalone_mode=False)


def test_onnxruntime_genai_answers_with_the_file_as_a_device_does(
    int8: Path, tmp_path: Path, engine: GenerationEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "global.onnx_adapter"
    convert_to(int8, out, "--adapter", "global", "--json")
    row = json.loads(capsys.readouterr().out)
    assert row == {"file": str(out), "adapter": "global", "version": 3, "bytes": out.stat().st_size}

    model = og.Model(str(int8 / "base"))
    ids = [int(token) for token in og.Tokenizer(model).encode(PROMPT)]
    adapters = og.Adapters(model)
    adapters.load(str(out), "global")
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + TOKENS, do_sample=False)
    inner = og.Generator(model, params)
    inner.set_active_adapter(adapters, "global")
    inner.append_tokens(np.array(ids, np.int32))
    scores = inner.get_logits().copy()

    engine.load(Library.open(int8, None).load(Composition.of("global")))
    engine.read(ids, SamplingParams(max_tokens=TOKENS), "global")
    expected = engine._live.inner.get_logits()  # type: ignore[union-attr]
    np.testing.assert_array_equal(scores, expected)
    engine.read(ids, SamplingParams(max_tokens=TOKENS), None)
    assert np.abs(scores - engine._live.inner.get_logits()).max() > 0.01  # type: ignore[union-attr]


def test_the_file_has_the_verified_tensors_or_their_composition(lm_bundle: Path, tmp_path: Path) -> None:
    library = Library.open(lm_bundle, None)
    for name in ("anna", "global:0.5+anna"):
        convert_to(lm_bundle, tmp_path / f"{name}.onnx_adapter", "--adapter", name)
        found = container.unpack((tmp_path / f"{name}.onnx_adapter").read_bytes())
        expected = library.load(Composition.of(name)).inputs
        assert found.keys() == expected.keys()
        for tensor, value in expected.items():
            assert found[tensor].dtype == np.float32
            np.testing.assert_array_equal(found[tensor], value)


def test_nothing_is_written_of_an_altered_adapter_or_over_another_file(lm_bundle: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    with refused(ConfigError, "kept"):
        convert_to(lm_bundle, kept, "--adapter", "global")
    assert kept.read_text() == "kept"
    flip(lm_bundle / adapter_path("global"), 0.5)
    with refused(TrustError, "global.onnx_adapter"):
        convert_to(lm_bundle, tmp_path / "new", "--adapter", "global")
    assert not (tmp_path / "new").exists()
