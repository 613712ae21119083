"""A bundle's policy holds for every way in which a device answers: labels, texts, compositions, commands, Python."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import edgeadapt
from aggregation.errors import ConfigError, DataError
from aggregation.pki.identity import IdentityKey
from client.cli import device
from client.inference import usage
from client.inference.generate import Conversation, Generator
from client.inference.session import ClassificationSession
from client.inference.text import Finish, SamplingParams
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.policy import Outcome, Policy
from edgeadapt.rounds.observation import ObservationTask
from export.bundle.write import add_adapter
from export.onnx.exported import ExportedBase
from tests.support import refused
from tests.support.models import Source

TEXT, OTHER = "turn on the light", "play some music"
Govern = Callable[..., ClassificationSession]


@pytest.fixture
def govern(bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey) -> Govern:
    def make(version: int = 4, **policy: Any) -> ClassificationSession:
        given = replace(source(version=version), policy=Policy(**policy))
        add_adapter(bundle, exported.adapter_inputs, given, key=vendor)
        return ClassificationSession.open(bundle)

    return make


@pytest.fixture
def ranked(bundle: Path) -> list[tuple[str, float]]:
    """All labels of the text without a policy, most likely first."""
    (found,) = ClassificationSession.open(bundle).rank([TEXT], "global", 9)
    return [(one.label, one.probability) for one in found]


def test_a_denied_label_is_never_given_and_never_listed(govern: Govern, ranked: list[tuple[str, float]]) -> None:
    (first, _), (second, _), *_ = ranked
    blocked = govern(deny=(first,), denied="Not from here.")
    found = blocked.ranking(TEXT, "global", 9)
    assert (found.outcome, found.says, found.predictions) == (Outcome.BLOCKED, "Not from here.", ())
    assert blocked.rank([TEXT], "global", 9) == blocked.rank_mixed([(TEXT, "global")], 9) == [[]]
    with refused(DataError, "policy"):
        blocked.classify([TEXT], "global")
    listed = govern(5, deny=(second,)).ranking(TEXT, "global", len(ranked)).predictions
    assert [one.label for one in listed] == [label for label, _ in ranked if label != second]


def test_an_answer_below_its_labels_threshold_says_so(govern: Govern, ranked: list[tuple[str, float]]) -> None:
    (label, probability), *_ = ranked
    for version, policy, outcome in (
        (4, {"thresholds": {label: probability + 0.01}}, Outcome.UNSURE),
        (5, {"thresholds": {label: probability - 0.01}, "least": 1.0}, Outcome.ANSWERED),
        (6, {"least": probability + 0.01}, Outcome.UNSURE),
        (7, {"confirm": (label,)}, Outcome.CONFIRM),
        (8, {"input": ("light",)}, Outcome.BLOCKED),
    ):
        found = govern(version, **policy).ranking(TEXT, "global", 1)
        assert found.outcome is outcome
        assert bool(found.predictions) == (outcome in (Outcome.ANSWERED, Outcome.CONFIRM)) == (found.says == "")


def test_only_groups_of_the_policy_are_combined(govern: Govern, with_anna: Path) -> None:
    session = govern(combine=(("global", "poet"),))
    with refused(ConfigError, "composition.policy"):
        session.load("global+anna")
    assert session.load("anna:2").name == "anna:2"
    assert govern(5, combine=(("global", "*"),)).load("global+anna").name == "anna+global"


def test_infer_and_python_say_what_the_policy_says(
    govern: Govern, bundle: Path, ranked: list[tuple[str, float]]
) -> None:
    govern(deny=(ranked[0][0],), denied="Not from here.", confirm=(ranked[1][0],))
    run = CliRunner()
    usage.Usage.begin(bundle)
    done = run.invoke(device, ["infer", "--bundle", str(bundle), "--json", TEXT, "🔥"])
    counted = usage.Usage.read(bundle)
    assert counted is not None
    counts = counted.counts(usage.today(), 1)
    assert (counts["outcome/blocked"], counts["outcome/unsure"], counts["labels/"]) == (1, 1, 2)
    task = ObservationTask(PeftConfig.lora(), (), ("outcome",), 0, 1)
    sums = task.shares(counts | {"lessons/answered": 20})[1:]  # as of a device that answered 18 more
    assert sums.tolist() == [0.0, 0.05, 0.05]  # to be confirmed, unsure, blocked
    (adapter,) = json.loads(done.stdout)["adapters"]
    stated = [(one["outcome"], one["says"], one["intents"]) for one in adapter["answers"]]
    assert stated == [("blocked", "Not from here.", []), ("unsure", Policy().unsure, [])]
    assert done.exit_code == 0
    assert run.invoke(device, ["infer", "--bundle", str(bundle), TEXT]).stdout.strip() == "Not from here."
    model = edgeadapt.load(bundle)
    assert isinstance(model, edgeadapt.Classifier)
    found = model(TEXT)
    assert (found.label, found.outcome, str(found)) == (None, "blocked", "Not from here.")


@pytest.mark.parametrize("spelled", ["light", "LIGHT", "li\u0001ght", "li\ue000ght", "lïght", "li\u0300ght", "li\vght"])
def test_a_forbidden_word_is_found_in_every_spelling_that_the_base_reads_as_it(govern: Govern, spelled: str) -> None:
    session = govern(input=("[^a-z]light[^a-z]",), denied="Not from here.")
    text = f"turn on the {spelled} in the hall"
    assert session.ranking(text, "global", 1).outcome is Outcome.BLOCKED
    assert session.rank_mixed([(text, "global"), (OTHER, "global")], 1)[0] == []
    assert session.ranking("turn on the lights in the hall", "global", 1).outcome is not Outcome.BLOCKED


@pytest.fixture
def writer(lm_bundle: Path, lm_source: Any, vendor: IdentityKey) -> Callable[..., Generator]:
    def make(version: int, **policy: Any) -> Generator:
        given = replace(lm_source(), version=version, policy=Policy(denied="No.", **policy))
        add_adapter(lm_bundle, given.adapter_inputs, given, key=vendor, form="fp32")
        return Generator.open(lm_bundle, threads=1)

    return make


def test_a_written_answer_is_given_whole_or_not_at_all(writer: Callable[..., Generator], lm_bundle: Path) -> None:
    params = SamplingParams(max_tokens=6)
    plain = "".join(Generator.open(lm_bundle, threads=1).complete("ab", params, "global"))
    sign = next(one for one in plain.lower() if one.isalnum())
    generator = writer(9, output=(sign,), input=("[^a-z]pin[^a-z]",))
    for question, tokens in (("ab", 6), ("my PIN", 0)):
        assert list(generator.complete(question, params, "global")) == ["No."]
        assert generator.last is not None
        assert (generator.last.finish, generator.last.tokens) == (Finish.BLOCKED, tokens)
    other = writer(10, output=("never written",))
    assert list(other.complete("ab", params, "global")) == [plain]


def test_what_is_blocked_is_not_part_of_the_conversation(writer: Callable[..., Generator]) -> None:
    conversation = Conversation(writer(9, input=("secret",)), SamplingParams(max_tokens=3), None, "global")
    assert "".join(conversation.ask("a Secret")) == "No."
    assert conversation.messages == ()
    assert "".join(conversation.ask("hello"))
    assert [message.content for message in conversation.messages][:1] == ["hello"]
