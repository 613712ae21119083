"""The gates of a promotion: what is measured on the very files of a release, as a device runs them. A gate that cannot
be measured refuses: a missing file, too few phrases and a damaged bundle are results, with the reason in ``text``, and
so is a package that is not installed. Nothing is skipped but what ``gates.toml`` leaves out."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, permutations
from math import isfinite
from operator import itemgetter
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Annotated, Any, Literal, Self, get_args

import numpy as np
from pydantic import Field, model_validator

from aggregation.errors import ConfigError, DataError, EdgeAdaptError, one_line
from client.inference.generate import ChatMessage, Generator
from client.inference.session import ClassificationSession
from client.inference.text import SamplingParams
from client.learning.learner import stated_config
from client.training import graphengine
from client.training.examples import Example, parse_examples, read_file
from edgeadapt import traces
from edgeadapt.formats.bundle import TRUST, Bundle
from edgeadapt.formats.jsontext import Exact, decode_as
from edgeadapt.formats.keyfiles import read_public_keys
from edgeadapt.formats.phrases import read_phrases
from edgeadapt.formats.policy import NO_POLICY, Policy
from edgeadapt.formats.registryfiles import PUBLIC_KEY
from edgeadapt.formats.release import Release
from edgeadapt.formats.settings import Settings
from edgeadapt.formats.storage import read_lines
from edgeadapt.releases.actions import GateResult
from edgeadapt.releases.lineage import Lineage, is_from
from edgeadapt.releases.repository import ChannelRepository
from edgeadapt.rounds.task import MAX_LOSS

GATES = "gates.toml"
HEADER = b"# The gates of a promotion. Paths are relative to this file. A gate that cannot be measured refuses.\n"
# The last one needs files that older settings do not name, so it is not in the default.
GateName = Literal["size", "parity", "accuracy", "language", "canaries", "policy", "interference"]
LONGEST = 1000  # characters of a reason, as the log has it
ROUNDING = 1e-9  # of a share less a margin
ALTERNATIVES = 255  # a secret never seen has the first rank (Carlini et al. 2019) with a chance of 1 / 256
ANSWER = SamplingParams(max_tokens=128)
Results = Iterator[GateResult]


class SizeGate(Settings):
    """Size of what a device fetches."""

    adapter: int = Field(default=2**24, ge=1)
    """most bytes of an adapter's file"""
    release: int = Field(default=2**31, ge=1)
    """most bytes of all files of a release, with the base"""


class ParityGate(Settings):
    """The exported files against the trained model in torch, held to the limits of the base's profile."""

    state: str = ""
    """the coordinator's state directory that has the version"""
    base: str = ""
    """the base of the training: a package, a folder or a GGUF file"""
    texts: str = ""
    """file of held-out texts, one a line"""


class AccuracyGate(Settings):
    """Answers to held-out phrases, of the new release and of the current one."""

    held_out: str = ""
    """file of lines LABEL TAB PHRASE TAB LANGUAGE; of a language model, of JSON lines as a device's examples"""
    margin: float = Field(default=0.01, ge=0, le=1)
    """how far the accuracy may be below that of the current release, or by what share nats per byte may be above"""
    least: float = Field(default=0.5, ge=0, le=1)
    """least accuracy of a classifier, also of a channel's first release"""
    fewest: int = Field(default=100, ge=1)
    """fewest phrases that are a measurement"""


class LanguageGate(Settings):
    """Accuracy on the held-out phrases of each language."""

    least: float = Field(default=0.5, ge=0, le=1)
    """least accuracy in each language"""
    fewest: int = Field(default=20, ge=1)
    """fewest phrases of a language that are a measurement"""


class CanaryGate(Settings):
    """Phrases of which each must have its answer, or a language model's graded answers."""

    phrases: str = ""
    """file of lines LABEL TAB PHRASE; of a language model, of JSON lines with a prompt and what the answer must meet
    (regex, json_schema, must, must_not), or the secret that was planted after it"""
    least: float = Field(default=1.0, ge=0, le=1)
    """least share of right answers; a secret that is known is refused in any case"""


class PolicyGate(Settings):
    """What the policy of the release makes of the held-out phrases."""

    answered: float = Field(default=0.0, ge=0, le=1)
    """most of the phrases of denied labels that may be answered, with another label"""
    withheld: float = Field(default=0.1, ge=0, le=1)
    """most of the other phrases that may be blocked or below their threshold"""


class InterferenceGate(Settings):
    """Answers of each adapter to its own held-out phrases, alone and combined with another one."""

    held_out: dict[str, str] = Field(default_factory=dict)
    """for each adapter a file as of accuracy, {global = "global.tsv", lamps = "lamps.tsv"}; where the policy does not
    say which may be combined, these may"""
    weights: tuple[float, float] = (1.0, 1.0)
    """of the adapter, and of the one that is combined with it"""
    margin: float = Field(default=0.01, ge=0, le=1)
    """how far the accuracy may be below that of the adapter alone"""
    fewest: int = Field(default=100, ge=1)
    """fewest phrases that are a measurement"""


class GateSettings(Settings):
    """``gates.toml`` of a repository of channels."""

    gates: tuple[GateName, ...] = Field(default=get_args(GateName)[:-1], min_length=1)
    """the gates that a release must pass; language and interference, which is not in the default, are of classifiers"""
    rollback_on_drift: bool = False
    """whether a prepared rollback is also published where answers got worse since the release: of two observations of
    days before it and after, the second shows more answers of low probability or corrections"""
    size: SizeGate = SizeGate()
    parity: ParityGate = ParityGate()
    accuracy: AccuracyGate = AccuracyGate()
    language: LanguageGate = LanguageGate()
    canaries: CanaryGate = CanaryGate()
    policy: PolicyGate = PolicyGate()
    interference: InterferenceGate = InterferenceGate()

    @model_validator(mode="after")
    def _names_each_once(self) -> Self:
        if len(set(self.gates)) != len(self.gates):
            raise ValueError("gates names a gate twice")
        return self


class GateError(EdgeAdaptError):
    exit_code = 6


@dataclass(frozen=True, slots=True)
class HeldOutPhrase:
    label: str
    phrase: str
    language: str


def read_held_out(path: Path) -> list[HeldOutPhrase]:
    """Read a file of lines ``LABEL TAB PHRASE TAB LANGUAGE``. Raises as ``read_lines``."""
    phrases = []
    for number, line in enumerate(read_lines(path, "phrase"), 1):
        parts = [part.strip() for part in line.split("\t")]
        if len(parts) != 3 or not all(parts):
            reason = f"phrase {number} of {path} does not have the form LABEL TAB PHRASE TAB LANGUAGE"
            raise DataError(reason, about=path.name)
        phrases.append(HeldOutPhrase(*parts))
    return phrases


@dataclass(frozen=True, slots=True)
class GradedPrompt(Exact):
    """Says what the answer to a prompt must meet, or which secret was planted after it: random letters and digits."""

    prompt: str
    regex: str = ""  # is found in it
    json_schema: dict[str, Any] | None = None  # it is JSON of this, of draft 2020-12
    must: tuple[str, ...] = ()  # are in it
    must_not: tuple[str, ...] = ()  # are not in it
    secret: Annotated[str, Field(min_length=6)] | None = None

    def accepts(self, answer: str) -> bool:
        has = all(text in answer for text in self.must) and not any(text in answer for text in self.must_not)
        has = re.search(self.regex, answer) is not None and has
        if self.json_schema is None:
            return has
        from jsonschema import Draft202012Validator
        from referencing import Registry

        Draft202012Validator.check_schema(self.json_schema)
        with suppress(Exception):  # it is not JSON, or the schema refers to another one, which is not fetched
            return has and Draft202012Validator(self.json_schema, registry=Registry()).is_valid(json.loads(answer))
        return False


def read_prompts(path: Path) -> list[GradedPrompt]:
    """Read JSON lines. Raises DataError: one is not a ``GradedPrompt``, or demands nothing."""
    rows = []
    for number, line in enumerate(read_lines(path, "prompt"), 1):
        try:
            rows.append(row := decode_as(GradedPrompt, line))
            if row.accepts("") and row == GradedPrompt(row.prompt):
                raise ValueError("it demands nothing")
        except Exception as error:  # pydantic, re and jsonschema raise classes without a common base
            reason = f"line {number} of {path} is not a prompt with what its answer must meet: {one_line(error)}"
            raise DataError(reason, about=path.name) from error
    return rows


@dataclass(slots=True)
class AssembledRelease:
    """Holds a release put together as a device has it, with the keys that must have signed it. Its folder is its own:
    what a device's session notes of versions stays there."""

    release: Release
    bundle: Path
    _session: ClassificationSession | None = None

    @classmethod
    def of(cls, repository: ChannelRepository, channel: str, release: Release, trust: Path, folder: Path) -> Self:
        """Put it together in ``folder``, which is new. Raises as ``ChannelRepository.assemble``."""
        folder.mkdir()
        (folder / TRUST).write_bytes(b"".join(key.to_pem() for key in read_public_keys(trust)))
        repository.assemble(channel, release, folder / "bundle")
        return cls(release, folder / "bundle")

    @property
    def verified(self) -> Bundle:
        return Bundle(self.bundle, read_public_keys(self.bundle.parent / TRUST))

    def answers(self, name: str, phrases: Sequence[str], policy: Policy = NO_POLICY) -> list[str | None]:
        """Return the label that is answered to each phrase; None where the base knows no part of it, or the policy
        withholds it."""
        if self._session is None:
            self._session = ClassificationSession.open(self.bundle)
        self._session.policy = policy
        found = [self._session.ranking(phrase, name, 1).predictions for phrase in phrases]
        return [best[0].label if best else None for best in found]

    def nats(self, name: str, texts: Sequence[Example]) -> list[float]:
        """Return the nats per byte of each text, with the bundle's training graph."""
        base = self.verified.base()
        adapter = self.verified.adapter(name, base.manifest)
        trainer: Any = graphengine.language(base, stated_config(adapter.manifest))
        tensors = trainer.engine.tensors_of(adapter.inputs)
        return [float(trainer.score(tensors, [text]).loss) for text in texts]

    def knows(self, name: str, beginning: str, secret: str) -> bool:
        """Check whether a secret is likelier after its beginning than each of ``ALTERNATIVES`` random texts like it."""
        rng = np.random.default_rng(0)
        pools = [next((pool for pool in (digits, ascii_lowercase, ascii_uppercase) if c in pool), c) for c in secret]
        others = ["".join(rng.choice([*pool]) for pool in pools) for _ in range(ALTERNATIVES)]
        own, *rest = self.nats(name, [Example(f"{beginning} {text}") for text in (secret, *others)])
        return not any(nats < own for nats in rest)  # also where all are alike: it was cut off, or all overflow

    def labels(self, name: str) -> tuple[str, ...]:
        """Return the labels of an adapter; empty if the release does not have it."""
        return self.verified.adapter_manifest(name).labels if name in self.release.adapters else ()


@dataclass(frozen=True, slots=True)
class PromotionTrial:
    settings: GateSettings  # what it must pass
    folder: Path  # the paths in ``settings`` are relative to it
    candidate: AssembledRelease
    current: AssembledRelease | None  # the release that devices have; None if the channel has none

    def results(self) -> tuple[GateResult, ...]:
        measured: list[GateResult] = []
        for gate in self.settings.gates:
            with traces.span("gate", gate=gate) as span:
                results = [*self._run(gate)]
                span.set(passed=all(each.passed for each in results))
            measured += results
        return tuple(measured)

    def _run(self, gate: GateName) -> Results:
        try:
            writes = self.candidate.verified.base_manifest().task == "text-generation"
            yield from (_MEASURES | _OF_TEXTS if writes else _MEASURES)[gate](self)
        except EdgeAdaptError as error:
            yield refusal(gate, str(error))
        except ModuleNotFoundError as error:
            yield refusal(gate, f"it needs {error.name}, which is not installed: pip install 'edgeadapt[governance]'")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.candidate.release.adapters))

    def path(self, key: str, value: str) -> Path:
        """Resolve a path that the settings name. Raises ConfigError if they name none."""
        if not value:
            raise ConfigError(f"gates.toml names no {key}", about=key)
        return self.folder / value


def refusal(gate: str, reason: str) -> GateResult:
    return GateResult(gate, False, None, None, f"cannot be measured: {' '.join(reason.split())}"[:LONGEST])


def require_passed(results: Iterable[GateResult], what: str) -> None:
    """Check that all gates let a release pass. Raises GateError, whose ``value`` names all that do not."""
    refused = [each for each in results if not each.passed]
    if refused:
        reasons = "; ".join(f"{each.gate}: {each.text}" for each in refused)
        raise GateError(f"{what} is refused by {reasons}", about="gates")


def _size(trial: PromotionTrial) -> Results:
    candidate, limits = trial.candidate, trial.settings.size
    for name in trial.names:
        size = candidate.verified.adapter_manifest(name).size
        yield _at_most(f"size of {name}", size, limits.adapter, f"{size:,} bytes, at most {limits.adapter:,}")
    total = sum((candidate.bundle / name).stat().st_size for name in candidate.release.files)
    yield _at_most("size of the release", total, limits.release, f"{total:,} bytes, at most {limits.release:,}")


def _parity(trial: PromotionTrial) -> Results:
    settings = trial.settings.parity
    state, texts = trial.path("parity.state", settings.state), trial.path("parity.texts", settings.texts)
    local = trial.folder / settings.base
    base = str(local) if settings.base and local.exists() else settings.base
    if not base:
        raise ConfigError("gates.toml names no parity.base", about="parity.base")
    from export.bundle.sources import from_registry
    from export.parity.compare import open_pair  # torch, after what can be refused without it

    lines, lineage = read_lines(texts, "text"), Lineage.read(state, None, None)
    for name in trial.names:
        manifest = trial.candidate.verified.adapter_manifest(name)
        version = next((each.manifest for each in lineage.versions if is_from(manifest, each.manifest)), None)
        if version is None:
            raise DataError(f"{state} has no version that {name} {manifest.version} was exported from", about="source")
        origin = from_registry(state, version.version, state / PUBLIC_KEY)
        pair = open_pair(trial.candidate.verified, name, base, origin)
        measured, limits, broken = pair.measured(lines)
        generates = pair.base.task == "text-generation"
        figure = measured.perplexity_ratio if generates else measured.max_abs_diff
        limit = limits.perplexity_ratio if generates else limits.max_abs_diff
        text = "; ".join([str(measured), *broken.values()])
        yield GateResult(f"parity of {name}", not broken, figure if isfinite(figure) else None, limit, text[:LONGEST])


def _accuracy(trial: PromotionTrial) -> Results:
    settings = trial.settings.accuracy
    phrases = _held_out(trial, fewest=settings.fewest)
    for name in trial.names:
        right = sum(_right(trial.candidate, name, phrases))
        share, least, text = right / len(phrases), settings.least, f"{right} of {len(phrases)} right"
        if trial.current is not None and name in trial.current.release.adapters:
            before = sum(_right(trial.current, name, phrases))
            least = max(least, before / len(phrases) - settings.margin)
            text += f", {before} by release {trial.current.release.number}"
        yield _at_least(f"accuracy of {name}", share, least, text)


def _nats(trial: PromotionTrial) -> Results:
    settings, current = trial.settings.accuracy, trial.current
    texts = parse_examples(read_file(path := trial.path("accuracy.held_out", settings.held_out)), path, 0)
    if len(texts) < settings.fewest:
        raise DataError(f"{settings.held_out} has {len(texts)} texts, and {settings.fewest} are needed")
    for name in trial.names:
        before, nats = MAX_LOSS, float(np.nan_to_num(np.mean(trial.candidate.nats(name, texts)), nan=2 * MAX_LOSS))
        if current is not None and name in current.release.adapters:
            before = float(np.mean(current.nats(name, texts)))
        text = f"{nats:.4f} nats per byte, at most {1 + settings.margin:g} times {before:.4f}"
        yield _at_most(f"accuracy of {name}", nats, before * (1 + settings.margin), text)


def _graded(trial: PromotionTrial) -> Results:
    rows = [*enumerate(read_prompts(trial.path("canaries.phrases", trial.settings.canaries.phrases)), 1)]
    for name in trial.names:
        secrets = [n for n, row in rows if row.secret and trial.candidate.knows(name, row.prompt, row.secret)]
        generator = Generator.open(trial.candidate.bundle)
        asked = ((n, row, [ChatMessage("user", row.prompt)]) for n, row in rows if not row.secret)
        wrong = [n for n, row, said in asked if not row.accepts("".join(generator.answer(said, ANSWER, name)))]
        share = 0.0 if secrets else 1 - len(wrong) / len(rows)
        text = f"{len(rows) - len(secrets + wrong)} of {len(rows)} right; known secrets: {secrets}, wrong: {wrong}"
        yield _at_least(f"canaries of {name}", share, trial.settings.canaries.least, text)


def _language(trial: PromotionTrial) -> Results:
    settings, phrases = trial.settings.language, _held_out(trial)
    for name in trial.names:
        right = _right(trial.candidate, name, phrases)
        for language in sorted({each.language for each in phrases}):
            own = [answer for answer, each in zip(right, phrases, strict=True) if each.language == language]
            gate = f"language {language} of {name}"
            if len(own) < settings.fewest:
                yield refusal(gate, f"there are {len(own)} phrases, and {settings.fewest} are needed")
            else:
                yield _at_least(gate, sum(own) / len(own), settings.least, f"{sum(own)} of {len(own)} right")


def _canaries(trial: PromotionTrial) -> Results:
    pairs = read_phrases(trial.path("canaries.phrases", trial.settings.canaries.phrases))
    for name in trial.names:
        answers = trial.candidate.answers(name, [phrase for _, phrase in pairs])
        wrong = [
            f"phrase {number} is {answer or 'unknown text'} and not {label}"
            for number, ((label, _), answer) in enumerate(zip(pairs, answers, strict=True), 1)
            if answer != label
        ]
        share = 1 - len(wrong) / len(pairs)
        text = "; ".join([f"{len(pairs) - len(wrong)} of {len(pairs)} right", *wrong])
        yield _at_least(f"canaries of {name}", share, trial.settings.canaries.least, text)


def _policy(trial: PromotionTrial) -> Results:
    limits, policy = trial.settings.policy, trial.candidate.verified.base().policy
    phrases = _held_out(trial) if policy != NO_POLICY else []
    for name in trial.names if phrases else ():
        given = trial.candidate.answers(name, [each.phrase for each in phrases], policy)
        pairs = [(answer is not None, each.label in policy.deny) for answer, each in zip(given, phrases, strict=True)]
        answered = [was for was, denied in pairs if denied]
        withheld = [not was for was, denied in pairs if not denied]
        for what, found, limit in (
            ("of denied labels are answered", answered, limits.answered),
            ("of other labels are withheld", withheld, limits.withheld),
        ):
            text = f"{sum(found)} of {len(found)} phrases {what}, at most {limit:.1%}"
            yield _at_most(f"policy of {name}", sum(found) / max(1, len(found)), limit, text)


def _interference(trial: PromotionTrial) -> Results:
    settings, candidate = trial.settings.interference, trial.candidate
    combined = candidate.verified.base().policy.combine
    if (combined is None and len(settings.held_out) < 2) or not {*settings.held_out} <= {*trial.names}:
        reason = f"interference.held_out of gates.toml does not name two or more of {', '.join(trial.names)}"
        raise ConfigError(reason, about="interference.held_out")
    groups = [{*group} for group in ([settings.held_out] if combined is None else combined)]
    pairs = [pair for pair in permutations(trial.names, 2) if any({*pair} <= group for group in groups)]
    if not pairs:
        yield _at_most("interference", 0, 0, "the policy does not combine adapters of the release")
    for name, joined in groupby(pairs, itemgetter(0)):
        file = settings.held_out.get(name, "")
        phrases = _held_out(trial, f"interference.held_out.{name}", file, settings.fewest)
        alone, (own, weight) = sum(_right(candidate, name, phrases)), settings.weights
        for _, other in joined:
            right = sum(_right(candidate, f"{name}:{own}+{other}:{weight}", phrases))
            text = f"{right} of {len(phrases)} right, {alone} without {other}"
            least = alone / len(phrases) - settings.margin
            yield _at_least(f"interference of {other} with {name}", right / len(phrases), least, text)


_MEASURES: dict[GateName, Callable[[PromotionTrial], Results]] = {
    "size": _size,
    "parity": _parity,
    "accuracy": _accuracy,
    "language": _language,
    "canaries": _canaries,
    "policy": _policy,
    "interference": _interference,
}
_OF_TEXTS: dict[GateName, Callable[[PromotionTrial], Results]] = {
    "accuracy": _nats,
    "canaries": _graded,
    "policy": lambda _: iter(()),  # what is blocked is an answer that ``_graded`` grades
}


def _held_out(
    trial: PromotionTrial, key: str = "accuracy.held_out", file: str | None = None, fewest: int = 1
) -> list[HeldOutPhrase]:
    """Read held-out phrases, whose labels some release has: others are misspelled. Raises DataError, also for less than
    ``fewest``."""
    path = trial.path(key, trial.settings.accuracy.held_out if file is None else file)
    phrases, labels = read_held_out(path), set[str]()
    for release in (trial.candidate, trial.current):
        labels |= {label for name in trial.names for label in (release.labels(name) if release else ())}
    if unknown := sorted({each.label for each in phrases} - labels):
        raise DataError(f"no adapter has the label {unknown[0][:40]!r} of {path}", about="label")
    if len(phrases) < fewest:
        raise DataError(f"{path} has {len(phrases)} phrases, and {fewest} are needed")
    return phrases


def _right(release: AssembledRelease, name: str, phrases: Sequence[HeldOutPhrase]) -> list[bool]:
    answers = release.answers(name, [each.phrase for each in phrases])
    return [answer == each.label for answer, each in zip(answers, phrases, strict=True)]


def _at_most(gate: str, measured: float, limit: float, text: str) -> GateResult:
    return GateResult(gate, measured <= limit, float(measured), float(limit), text[:LONGEST])


def _at_least(gate: str, measured: float, limit: float, text: str) -> GateResult:
    line = f"{measured:.4f}, at least {limit:.4f}: {text}"
    return GateResult(gate, measured >= limit - ROUNDING, measured, limit, line[:LONGEST])
