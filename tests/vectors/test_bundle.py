"""The vectors of docs/reference/bundle-format.md, read by a device and by ``reader``, which shares no code with it."""

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.errors import EdgeAdaptError
from client.inference import ClassificationSession
from edgeadapt.formats.bundle import TRUST
from tests.support.programs import READER, other_reader
from tests.vectors import make_bundle
from tests.vectors.bundle_cases import BASE_PATH, FILE, MANIFEST, Case, Made
from tests.vectors.make_bundle import FOLDER, FORMATS, in_hex, opened

EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
CASES: list[Case] = json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))
KEYS = r"trust\.pem|key\.(?:pem|type|encoding|small-order)"
TENSOR = r"DataError (?!\.onnx_adapter|adapter-manifest|labels)(?s:.+)"  # the name of one
ABOUT = {  # rule → what the native reader's refusal is about, and its class
    "trust": rf"TrustError (?:{KEYS})",
    "envelope": r"TrustError envelope",
    "type": r"TrustError payloadType",
    "signature": r"TrustError (?:keyid|signature)",
    "manifest": r"TrustError (?:base|adapter)-manifest.*",
    "needed": r"TrustError (?:model\.onnx|tokenizer\.json|genai_config\.json)",
    "unlisted": r"TrustError extra\.onnx",
    "missing": r"DataError \S+\.(?:onnx|data|json|onnx_adapter)",
    "digest": r"TrustError \S+\.(?:onnx|data|json|onnx_adapter)",
    "name": r"(?:ConfigError name|TrustError adapter-manifest\.name)",
    "base": r"TrustError adapter-manifest\.base_digest",
    "policy": r"TrustError adapter-manifest\.policy",
    "container": r"DataError \.onnx_adapter",
    "numbers": TENSOR,
    "slots": TENSOR,
    "rank": r"DataError adapter-manifest\.rank",
    "layout": r"DataError adapter-manifest\.layout_digest",
    "labels": r"DataError (?:adapter-manifest\.)?labels",
    "seen": r"TrustError trust\.seen\.json",
    "version": r"TrustError adapter-manifest\.version",
    "content": r"TrustError adapter-manifest\.source",
}
Answer = dict[str, Any]  # as reader/main.mjs writes it


@pytest.fixture
def natively(tmp_path: Path) -> Callable[[Path, Case], Answer]:
    """Opens a case as a device does; ``rule`` is the class of the refusal and what it is about."""

    def run(folder: Path, case: Case) -> Answer:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder / "bundle", copy / "bundle")
        for path, content in ({TRUST: (folder / TRUST).read_text()} | case["files"]).items():
            if content is None:
                (copy / path).unlink(missing_ok=True)
            else:
                raw = content.encode() if isinstance(content, str) else bytes.fromhex(content["hex"])
                (copy / path).write_bytes(raw)
        try:
            inputs, seen = opened(copy, case["adapter"])
        except EdgeAdaptError as error:
            return {"rule": f"{type(error).__name__} {error.about}", "lines": str(error).count("\n") + 1}
        return {"rule": None, "tensors": in_hex(inputs), "seen": seen}

    return run


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_device_accepts_and_refuses_as_the_vectors_say(natively: Any, case: Case) -> None:
    answer = natively(FOLDER, case)
    if case["rule"] is None:
        assert answer["rule"] is None
    else:
        assert re.fullmatch(ABOUT[case["rule"]], str(answer["rule"]))
        assert answer["lines"] == 1


def test_the_cases_have_every_rule_and_some_that_are_accepted() -> None:
    counts = Counter(case["rule"] for case in CASES)
    assert set(counts) == {None, *ABOUT}
    assert counts[None] >= 20
    assert len({case["name"] for case in CASES}) == len(CASES)
    page = (Path(__file__).parents[2] / "docs/reference/bundle-format.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)`", page.partition("\n## Rules\n")[2].partition("\n## ")[0])
    assert set(named) == set(ABOUT)


def test_the_reader_in_javascript_refuses_by_the_same_rules() -> None:
    found = {case["name"]: answer["rule"] for case, answer in zip(CASES, other_reader(FOLDER, CASES), strict=True)}
    assert found == {case["name"]: case["rule"] for case in CASES}


def test_it_reads_the_same_bits_and_notes_the_same_version(natively: Any) -> None:
    accepted = [case for case in CASES if case["rule"] is None]
    plain = [{"adapter": form, "files": {}} for form in FORMATS]
    for case, answer in zip([*plain, *accepted], other_reader(FOLDER, [*plain, *accepted]), strict=True):
        assert answer == natively(FOLDER, case), case
    assert [answer | {"rule": None} for answer in EXPECTED["adapters"].values()] == other_reader(FOLDER, plain)


def test_it_uses_nothing_of_this_project_and_no_library() -> None:
    imports = [name for file in READER.glob("*.mjs") for name in re.findall(r'from "([^"]+)"', file.read_text())]
    assert len(imports) > 5
    assert [name for name in imports if not re.fullmatch(r"node:\w+|\./\w+\.mjs", name)] == []
    assert not any("import(" in file.read_text() or 'require("' in file.read_text() for file in READER.glob("*.mjs"))


def test_a_device_answers_with_the_expected_logits(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "copy")
    session = ClassificationSession.open(tmp_path / "copy" / "bundle")
    for answer in EXPECTED["answers"]:
        for form, logits in answer["logits"].items():
            exponentials = np.exp((np.array(logits) - max(logits)) / make_bundle.TEMPERATURE)
            ((*ranking,),) = session.rank([answer["text"]], form, 3)
            expected = dict(zip(make_bundle.LABELS, exponentials / exponentials.sum(), strict=True))
            assert {one.label: one.probability for one in ranking} == pytest.approx(expected, abs=1e-5)
    assert len({tuple(round(x, 3) for x in a["logits"]["fp32"]) for a in EXPECTED["answers"]}) > 1


def damaged(rng: random.Random, case: Case, path: str, raw: bytes) -> Case:
    changed = bytearray(raw[: rng.randrange(len(raw))] if rng.random() < 0.1 else raw)
    for _ in range(rng.choice((1, 1, 3))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return case | {"files": case["files"] | {path: {"hex": changed.hex()}}}


def test_both_readers_agree_on_files_with_flipped_bits(natively: Any) -> None:
    rng, case = random.Random(5), {"adapter": "int8", "files": {}}  # noqa: S311  # not a secret
    raw = {path: (FOLDER / path).read_bytes() for path in (TRUST, BASE_PATH, MANIFEST, FILE)}
    cases = [damaged(rng, case, path, raw[path]) for path in raw for _ in range(20)]
    signature = json.loads(raw[MANIFEST])["signatures"][0]["keyid"].encode()
    cases += [case | {"files": {MANIFEST: raw[MANIFEST].replace(signature, b"other").decode()}}]
    for each, answer in zip(cases, other_reader(FOLDER, cases), strict=True):
        _agree(natively(FOLDER, each), answer, each)


def _agree(found: Answer, answer: Answer, case: Case) -> None:
    if answer["rule"] is None:
        assert answer == found
    else:
        assert re.fullmatch(ABOUT[answer["rule"]], str(found["rule"])), (answer["rule"], found["rule"], case)


def test_both_readers_agree_on_signed_files_with_flipped_bits(natively: Any) -> None:
    rng, made = random.Random(6), Made(FOLDER)  # noqa: S311  # not a secret
    cases = []
    for _ in range(100):
        blob = bytearray(made.blob)
        blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
        cases.append({"adapter": "int8", "files": made.with_blob(bytes(blob))})
    answers = other_reader(FOLDER, cases)
    for each, answer in zip(cases, answers, strict=True):
        _agree(natively(FOLDER, each), answer, each)
    rules = Counter(answer["rule"] for answer in answers)
    assert min(rules[None], rules["container"], rules["numbers"]) > 5


def test_the_script_still_writes_these_vectors(tmp_path: Path) -> None:
    """If this fails after a change of the format: python -m tests.vectors.make_bundle; then mend page and reader."""
    make_bundle.write(tmp_path)
    for form in FORMATS:
        for name in (f"bundle/adapters/{form}.json", f"bundle/adapters/{form}.onnx_adapter", TRUST):
            assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name
    found = json.loads((tmp_path / "expected.json").read_text(encoding="utf-8"))
    assert found["adapters"] == EXPECTED["adapters"]
    cases = json.loads((tmp_path / "cases.json").read_text(encoding="utf-8"))
    assert [(case["name"], case["rule"]) for case in cases] == [(case["name"], case["rule"]) for case in CASES]
    # The digests of the base's files depend on the versions of onnx and tokenizers.
    fields = [Made(folder).base_body | {"files": None} for folder in (tmp_path, FOLDER)]
    assert fields[0] == fields[1]
