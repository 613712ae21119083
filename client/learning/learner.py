"""``Learner``: tunes the private adapter of a bundle to corrections, puts it into use, and takes it back.

::

    trust.pem                   pinned keys; the first correction adds that of ``learned/key.pem``
    learned/key.pem             signs what this device has learned
    learned/sealing.key         encrypts the next
    learned/history.sealed      corrections, and the adapters before the last of them (``corrections.LessonHistory``)
    learned/learn.lock          held while a device learns
    bundle/adapters/NAME.*      the private adapter: readable by its owner only

Nothing of this leaves the device. Whatever fails, and whenever the process is killed, the adapter in use stays.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from stat import S_IMODE

from adapters import container, storage
from adapters.bundle import PHRASES, TOKENIZER, TRUST, VerifiedAdapter, adapter_names, adapter_path, manifest_path
from adapters.keyfiles import read_key
from adapters.layout import Tensors
from adapters.manifest import AdapterManifest
from adapters.phrases import parse_phrases
from adapters.quantization import quantize
from aggregation.entropy import Entropy, SystemEntropy
from aggregation.errors import ConfigError, DataError, TrustError
from aggregation.pki.identity import IdentityKey, PublicKey
from client.inference.library import Library
from client.inference.phrases import PhraseReader
from client.inference.session import Prediction
from client.learning.corrections import MAX_AT_ONCE, MAX_FILE, Before, Correction, Lesson, LessonHistory
from client.learning.tune import probabilities, tune
from client.training.examples import MAX_TEXT, Example
from client.training.graphtrainer import GraphTrainer

LEARNED, KEY, SEALING_KEY, HISTORY, LOCK = "learned", "key.pem", "sealing.key", "history.sealed", "learn.lock"
PERSONAL = "personal"  # the private adapter that is made of a global one
MAX_REHEARSED = 32  # phrases
MAX_TESTED = 32  # phrases
MAX_HISTORY = 2**30  # bytes


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers to a phrase before and after learning, and its label."""

    text: str = field(repr=False)
    label: str
    before: Prediction
    after: Prediction


@dataclass(frozen=True, slots=True)
class Learned:
    """What learning did.

    Attributes:
        adapter, version: The private adapter that is in use now.
        steps, seconds: Of training.
        taught: The corrections.
        changed: Of the ``tested`` other phrases, those with another answer than before.
    """

    adapter: str
    version: int
    steps: int
    seconds: float
    taught: tuple[Answers, ...]
    changed: tuple[Answers, ...]
    tested: int


@dataclass(frozen=True, slots=True)
class Undone:
    """What undoing did: the adapter in use, and what it does not know any more."""

    adapter: str
    version: int
    corrections: tuple[Correction, ...]


@dataclass(frozen=True, slots=True)
class Learner:
    """A bundle and what the device has learned; hold it by ``open``."""

    library: Library
    adapter: VerifiedAdapter  # in use
    target: str  # the private adapter that is written
    keys: tuple[IdentityKey, bytes] = field(repr=False)  # signing, sealing
    trust: Path
    folder: Path
    history: LessonHistory

    @classmethod
    @contextmanager
    def open(
        cls, bundle: Path, trust: Path | None = None, name: str | None = None, entropy: Entropy | None = None
    ) -> Iterator["Learner"]:
        """Verify a bundle and open what was learned, which no other process can do at the same time.

        Args:
            bundle: The folder.
            trust: The pinned public keys; by default ``trust.pem`` in the folder that contains the bundle.
            name: The adapter that shall learn; by default that in use. One that is not private stays, and a private one
                is made from it.
            entropy: Draws the keys, the first time.

        Raises:
            TrustError, DataError, ConfigError: As ``Library.open``, ``Library.default`` and ``Trust.adapter``; or
                another process learns, or what was learned cannot be opened.
        """
        library = Library.open(bundle, trust, "text-classification")
        folder = bundle.resolve().parent / LEARNED
        folder.mkdir(mode=storage.PRIVATE_FOLDER, exist_ok=True)
        try:
            with storage.locked(folder / LOCK, timeout=0):
                adapter = library.trust.adapter(name or library.default(), library.base)
                target = adapter.manifest.name if adapter.manifest.parent else PERSONAL
                if target != adapter.manifest.name and target in adapter_names(bundle):
                    reason = f"{bundle} has a private adapter already: teach that with --adapter {target}"
                    raise ConfigError(reason, about="--adapter", value=name)
                keys = _keys(folder, entropy or SystemEntropy())
                history = _history(folder / HISTORY, keys[1]).current(adapter.manifest.sha256)
                pinned = trust or bundle.resolve().parent / TRUST
                yield cls(library, adapter, target, keys, pinned, folder, history)
        except TimeoutError as error:
            reason = f"another program is learning with {bundle}: try again when it has ended"
            raise ConfigError(reason, about=LOCK) from error

    def teach(self, corrections: Sequence[Correction]) -> Learned:
        """Tune the adapter in use until it answers corrections as taught, and put it into use.

        It rehearses recent corrections, and a phrase for each label of the public ones that the bundle has; it tests
        recent corrections, and public phrases that are not rehearsed.

        Raises:
            DataError: A text or label cannot be learned, there are none or too many, none was learned, or a loss is not
                finite.
            ConfigError: The bundle has no training graph, or not one for this adapter.
            OSError: The disk is full, for example.
        """
        labels, manifest = self.adapter.manifest.labels, self.adapter.manifest
        taught = self._checked(corrections)
        if manifest.peft_config is None:
            reason = f"adapter {manifest.name!r} does not state its PEFT config, which training needs: export it again"
            raise ConfigError(reason, about="adapter-manifest.peft_config")
        trainer = GraphTrainer(self.library.base, len(labels), manifest.peft_config)
        start, begun = trainer.tensors_of(self.adapter.inputs), time.perf_counter()
        rehearsed, tested = self._others({one.text for one in taught})
        tuned = tune(trainer, start, taught, rehearsed)
        seconds = time.perf_counter() - begun
        everything = [*taught, *tested]
        answers = self._answers(trainer, everything, start, tuned.adapter)
        own, others = answers[: len(taught)], answers[len(taught) :]
        if not any(one.after.label == one.label for one in own):
            reason = f"nothing was learned in {tuned.steps} steps; the adapter in use stays: teach other phrases"
            raise DataError(reason, about="corrections")
        changed = tuple(one for one in others if one.before.label != one.after.label)
        made = self._replace(corrections, trainer.inputs_of(tuned.adapter))
        return Learned(made.name, made.version, tuned.steps, seconds, own, changed, len(others))

    def undo(self) -> Undone:
        """Go back to the adapter before the last lesson.

        Raises:
            DataError: The adapter in use was not learned here, or no lesson is left.
            OSError: As ``teach``.
        """
        lesson, history = self.history.undone()
        if lesson.before is None:
            self._write({}, removed=self.target)
            used = self.library.trust.bundle.adapter_manifest(self.library.default())
        else:
            manifest = AdapterManifest.accept(lesson.before.manifest, (*self._trusted(), self.keys[0].public))
            used = replace(manifest, version=self._next())
            self._install(used, lesson.before.blob)
        self._save(history)
        return Undone(used.name, used.version, lesson.corrections)

    def _checked(self, corrections: Sequence[Correction]) -> list[Example]:
        """The corrections as examples. Raises DataError as ``teach``."""
        labels = self.adapter.manifest.labels
        if not 0 < len(corrections) <= MAX_AT_ONCE:
            reason = f"{len(corrections)} corrections are given: teach 1 to {MAX_AT_ONCE} at once"
            raise DataError(reason, about="corrections", value=len(corrections))
        if len({one.text for one in corrections}) < len(corrections):
            raise DataError("a phrase is given twice: teach it with one label", about="corrections")
        reader = PhraseReader.of(self.library.base.files[TOKENIZER])
        for number, one in enumerate(corrections, 1):
            if one.label not in labels:
                known = ", ".join(labels[:40])
                reason = f"phrase {number} has the label {one.label[:40]!r}, which the adapter lacks; it has: {known}"
                raise DataError(reason, about="label", value=one.label)
            if len(one.text) > MAX_TEXT:
                reason = f"phrase {number} has {len(one.text)} characters, above the limit of {MAX_TEXT}: shorten it"
                raise DataError(reason, about="text", value=len(one.text))
            reader.tokens(one.text)
        return [Example(one.text, labels.index(one.label)) for one in corrections]

    def _others(self, taught: set[str]) -> tuple[list[Example], list[Example]]:
        """What is rehearsed while these texts are taught, and what is tested: recent corrections, and other phrases."""
        labels, base = self.adapter.manifest.labels, self.library.base
        public = parse_phrases(base.read(PHRASES), base.folder / PHRASES) if PHRASES in base.manifest.files else []
        corrected = self.history.corrections
        known = taught | {one.text for one in corrected}
        unknown = [(label, text) for label, text in public if label in labels and text not in known]
        usable = [Example(text, labels.index(label)) for label, text in _in_lesson_order(unknown, len(corrected))]
        one_each = list({example.label: example for example in usable}.values())
        earlier = [
            Example(one.text, labels.index(one.label))
            for one in corrected[::-1]
            if one.label in labels and one.text not in taught
        ]
        recent = earlier[: MAX_REHEARSED // 2]
        rehearsed = [*recent, *one_each][:MAX_REHEARSED]
        return rehearsed, [*recent, *(example for example in usable if example not in rehearsed)][:MAX_TESTED]

    def _answers(
        self, trainer: GraphTrainer, examples: Sequence[Example], before: Tensors, after: Tensors
    ) -> tuple[Answers, ...]:
        labels, temperature = self.adapter.manifest.labels, self.adapter.manifest.temperature
        texts = [example.text for example in examples]
        found = [
            [Prediction(labels[int(row.argmax())], float(row.max())) for row in probabilities(logits, temperature)]
            for logits in (trainer.logits(adapter, texts) for adapter in (before, after))
        ]
        return tuple(
            Answers(one.text, labels[one.label], *both)
            for one, both in zip(examples, zip(*found, strict=True), strict=True)
        )

    def _replace(self, corrections: Sequence[Correction], inputs: Tensors) -> AdapterManifest:
        """Put an adapter with these inputs into use, as a lesson that can be undone."""
        old = self.adapter.manifest
        blob = container.pack(quantize(inputs, "fp32"))
        digest = sha256(blob).hexdigest()
        made = replace(
            old,
            name=self.target,
            sha256=digest,
            size=len(blob),
            format="fp32",
            version=self._next(),
            source=digest,
            parent=old.parent or old.source,
            privacy=None,  # of what a device fitted to its own examples, nothing is bounded
        )
        bundle, before = self.library.bundle, None
        if old.name == self.target:
            paths = (bundle / manifest_path(old.name), bundle / adapter_path(old.name))
            before = Before(*(storage.read(path, MAX_FILE) for path in paths))
        lesson = Lesson(tuple(corrections), digest, old.sha256, before)
        self._save(self.history.then(lesson))  # first: a lesson that made no adapter is found and left out
        self._install(made, blob)
        return made

    def _next(self) -> int:
        seen = self.library.trust.seen.highest(self.library.manifest.base_digest, self.target)
        return max(seen, self.adapter.manifest.version) + 1

    def _save(self, history: LessonHistory) -> None:
        storage.replace(self.folder / HISTORY, history.seal(self.keys[1]))

    def _install(self, manifest: AdapterManifest, blob: bytes) -> None:
        """Put an adapter into the bundle, signed with the device's key, which is pinned first."""
        key = self.keys[0]
        if key.public not in self._trusted():
            pinned = storage.read(self.trust).rstrip() + b"\n" + key.public.to_pem()
            storage.replace(self.trust, pinned, S_IMODE(self.trust.stat().st_mode))
        files = {manifest_path(manifest.name): manifest.sign(key), adapter_path(manifest.name): blob}
        self._write({path.as_posix(): content for path, content in files.items()})

    def _write(self, files: dict[str, bytes], removed: str | None = None) -> None:
        """Replace the bundle, as a whole, by one with these files."""
        with storage.locked_folder(self.library.bundle) as whole:
            mode = S_IMODE(whole.stat().st_mode)
            with storage.staged(whole, mode=mode, replaces=True) as stage:
                storage.link_files(whole, stage)
                storage.write_files(stage, files)
                for name in files:
                    (stage / name).chmod(storage.PRIVATE)
                for path in (manifest_path(removed), adapter_path(removed)) if removed else ():
                    (stage / path).unlink()

    def _trusted(self) -> tuple[PublicKey, ...]:
        return self.library.trust.bundle.trusted


def _in_lesson_order(phrases: Sequence[tuple[str, str]], lesson: int) -> list[tuple[str, str]]:
    """Labels and phrases in the order of a lesson, which is another one for each number.

    A generator's order would be NumPy's own; digests give the same one in the browser (``page/learning/learner.js``).
    """
    return sorted(phrases, key=lambda pair: sha256("\t".join([str(lesson), *pair]).encode()).digest())


def _keys(folder: Path, entropy: Entropy) -> tuple[IdentityKey, bytes]:
    """The signing and the sealing key, which are made the first time."""
    if not (folder / KEY).exists():
        storage.replace(folder / KEY, IdentityKey.generate(entropy).to_pem())
    if not (folder / SEALING_KEY).exists():
        storage.replace(folder / SEALING_KEY, entropy.bytes(32))
    return read_key(folder / KEY), storage.read(folder / SEALING_KEY, 2**10)


def _history(path: Path, key: bytes) -> LessonHistory:
    if not path.exists():
        return LessonHistory()
    try:
        return LessonHistory.open(storage.read(path, MAX_HISTORY), key)
    except (TrustError, ConfigError, DataError) as error:
        reason = f"{path} is damaged or was sealed with another key ({error}): delete {path.parent} to start anew"
        raise TrustError(reason, about=HISTORY) from error
