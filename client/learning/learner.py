"""``Learner``: tunes the private adapter of a bundle to corrections, puts it into use, and takes it back.

::

    trust.pem                   pinned keys; the first correction adds that of ``learned/key.pem``
    learned/key.pem             signs what this device has learned
    learned/sealing.key         encrypts the next
    learned/history.sealed      corrections, and the adapters before the last of them (``corrections.LessonHistory``)
    learned/learn.lock          held while a device learns
    learned/training.sealed     a personal step that was interrupted, which the next one continues
    bundle/adapters/NAME.*      the private adapter: readable by its owner only

Nothing of this leaves the device. Whatever fails, and whenever the process is killed, the adapter in use stays."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from stat import S_IMODE
from typing import Any, cast

import numpy as np

from aggregation.entropy import Entropy, SystemEntropy
from aggregation.errors import ConfigError, DataError
from aggregation.pki.identity import IdentityKey, PublicKey
from client.inference.library import Library
from client.inference.phrases import PhraseReader
from client.inference.session import Prediction
from client.inference.text import checked, require_plain, special_tokens
from client.inference.usage import LEARNED, count, lesson_key, sealing_key
from client.node.statedir import SETTINGS, DeviceSettings
from client.training import graphengine
from client.training.control import UNLIMITED, TrainingCheckpoint, TrainingControl
from client.training.corrections import HISTORY, MAX_FILE, Before, Correction, Lesson, LessonHistory, check_count
from client.training.examples import MAX_TEXT, Example, Score, Split, encode_examples, in_split, longest, parse_examples
from client.training.hygiene import read_clean
from client.training.personal import (
    FINE_TUNE,
    Candidate,
    Choice,
    PersonalStep,
    Rehearsal,
    in_own_words,
    personalize,
    rehearsal,
)
from client.training.trainer import ClassifierTrainer, LanguageTrainer, Trainer, probabilities
from edgeadapt.bases.classifiergraph import MAX_TOKENS
from edgeadapt.formats import container, jsontext, storage
from edgeadapt.formats.bundle import (
    PHRASES,
    TOKENIZER,
    VerifiedAdapter,
    VerifiedBase,
    adapter_names,
    adapter_path,
    manifest_path,
)
from edgeadapt.formats.keyfiles import read_key
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.manifest import AdapterManifest
from edgeadapt.formats.manifest import Task as BundleTask
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.phrases import parse_phrases
from edgeadapt.formats.quantization import quantize
from edgeadapt.methods.parts import PARTS
from edgeadapt.rounds.analytic import BIAS, WEIGHT
from edgeadapt.rounds.task import Task

KEY, LOCK = "key.pem", "learn.lock"
PERSONAL = "personal"  # the private adapter that is made of a global one
MAX_REHEARSED = 32  # phrases
MAX_TESTED = 32  # phrases
TRAINING_STATE = "training.sealed"
PUBLIC_EACH = 2  # public phrases of a label that a personal step rehearses (docs/decisions/0034)
BATCH_SIZE = 16
LEARNING_RATE = 0.002  # for a lesson
LANGUAGE_RATE = 0.005  # the few steps of a language model's lesson have to change several tokens
VIRTUAL_RATE = 0.1  # virtual tokens are few numbers (Lester et al. 2021 train prompts at 0.3)
PERSONAL_RATE = 1e-3  # for a personal step


@dataclass(frozen=True, slots=True)
class Answers:
    """A classifier's answers to a phrase before and after learning. ``unread``: tokens at its end, not trained on."""

    text: str = field(repr=False)
    label: str
    before: Prediction
    after: Prediction
    unread: int

    @property
    def known(self) -> bool:
        return self.after.label == self.label

    @property
    def changed(self) -> bool:
        return self.before.label != self.after.label


@dataclass(frozen=True, slots=True)
class TextBits:
    """What a text costs a language model before and after learning, in bits per byte. ``known``: whether each of its
    tokens is the most likely one after learning: without sampling it is the answer."""

    prompt: str = field(repr=False)
    text: str = field(repr=False)
    before: float
    after: float
    known: bool


Learnt = Answers | TextBits


@dataclass(frozen=True, slots=True)
class Learned:
    """What a lesson did. ``others``: a classifier's earlier corrections and public phrases that were not rehearsed; a
    language model's earlier corrections, and the texts that were given to be compared."""

    adapter: str
    version: int
    steps: int
    seconds: float
    taught: tuple[Learnt, ...]
    others: tuple[Learnt, ...]


@dataclass(frozen=True, slots=True)
class Personalized:
    """What a personal step did.

    Attributes:
        adapter, version: The adapter that is in use now.
        made: Whether the step made it; else another one is better on the held-out examples.
        trained, held_out: Examples; corrections and public phrases are among the first.
        scores: On the held-out examples, by adapter: ``global``, ``in use`` before the step, and ``personal``, unless
            each personal adapter answers fewer public phrases right than the global one.
        others: Of a classifier, the held-out examples and counted public phrases; none if the adapter in use stays.
    """

    adapter: str
    version: int
    made: bool
    seconds: float
    trained: int
    held_out: int
    scores: Mapping[str, Score]
    others: tuple[Learnt, ...] = ()


@dataclass(frozen=True, slots=True)
class Undone:
    adapter: str
    version: int
    corrections: tuple[Correction, ...]


@dataclass(slots=True)
class Learner:
    """A bundle and what the device has learned; hold it by ``open``. It gives several lessons, one after the other."""

    library: Library
    adapter: VerifiedAdapter  # in use
    target: str  # the private adapter that is written
    keys: tuple[IdentityKey, bytes] = field(repr=False)  # signing, sealing
    folder: Path
    history: LessonHistory
    pending: Sequence[tuple[Correction, ...]] = ()  # lessons to repeat, whose corrections the file keeps until then
    relinked: bool = False  # whether the files of the base were linked again since they were hashed

    @classmethod
    @contextmanager
    def open(
        cls,
        bundle: storage.File,
        trust: storage.File | None = None,
        name: str | None = None,
        entropy: Entropy | None = None,
        task: BundleTask | None = None,
    ) -> Iterator["Learner"]:
        """Verify a bundle and open what was learned, which no other process can do at the same time.

        ``trust``: the pinned public keys; by default ``trust.pem`` in the folder that contains the bundle. ``name``:
        the adapter that shall learn; by default that in use. One that is not private stays, and a private one is made
        from it. ``task``: that the base must be for; None: any. Raises TrustError, DataError, ConfigError as
        ``Library.open``, ``Library.default`` and ``Trust.adapter``; or another process learns, or what was learned
        cannot be opened."""
        library = Library.open(bundle, trust, task)
        bundle = library.bundle
        folder = storage.real(bundle).parent / LEARNED
        folder.mkdir(mode=storage.PRIVATE_FOLDER, exist_ok=True)
        refusal = ConfigError(f"another program is learning with {bundle}: try again when it has ended", about=LOCK)
        with storage.locked_or(refusal, folder / LOCK):
            adapter = library.trust.adapter(name or library.default(), library.base)
            target = adapter.manifest.name if adapter.manifest.parent else PERSONAL
            if target != adapter.manifest.name and target in adapter_names(bundle):
                reason = f"{bundle} has a private adapter already: choose {target} instead of {adapter.manifest.name}"
                raise ConfigError(reason, about="--adapter")
            keys = _keys(folder, entropy or SystemEntropy())
            history = LessonHistory.read(folder / HISTORY, keys[1]).current(adapter.manifest.sha256)
            yield cls(library, adapter, target, keys, folder, history)

    def teach(
        self,
        corrections: Sequence[Correction],
        compared: Sequence[Example] = (),
        report: Callable[[int], object] = lambda _: None,
    ) -> Learned:
        """Tune the adapter in use until it answers corrections as taught, and put it into use.

        Recent corrections are rehearsed. A classifier also rehearses, of the public phrases that the bundle has, one
        for each label, that in the words of all corrections.

        Args:
            corrections: Phrases and their labels; of a language model prompts, and the right answer to each.
            compared: Of a language model: texts that are not trained, to see what is forgotten.

        Raises:
            DataError: A correction cannot be learned, there are none or too many, none was learned, or a loss is not
                finite.
            ConfigError: The bundle has no training graph, or not one for this adapter; or a classifier has texts to
                compare.
            OSError: The disk is full, for example.
        """
        check_count(corrections)
        manifest, done = self.adapter.manifest, 0
        subject = self._subject(manifest)
        taught = subject.checked(corrections)

        def step() -> None:
            nonlocal done
            report(done := done + 1)

        trainer, engine, begun = subject.trainer, _graph(subject.trainer), time.perf_counter()
        start = engine.tensors_of(self.adapter.inputs)
        rehearsed, others = subject.others(taught, compared)
        tuned = trainer.teach(start, taught, rehearsed, subject.rate(lesson=True), step)
        seconds = time.perf_counter() - begun
        answers = subject.learnt([*taught, *others], start, tuned)
        own = answers[: len(taught)]
        if not any(one.known for one in own):
            reason = f"nothing was learned in {done} steps; the adapter in use stays: teach something else"
            raise DataError(reason, about="corrections")
        used = self._put_into_use(manifest, corrections, engine.inputs_of(tuned))
        count(self.library.bundle, [lesson_key(undone=False)] * len(corrections))
        return Learned(used.name, used.version, done, seconds, own, answers[len(taught) :])

    def personalize(
        self,
        examples: storage.File,
        how: PersonalStep,
        learning_rate: float | None,
        control: TrainingControl = UNLIMITED,
        variants: int = 0,
    ) -> Personalized:
        """Make a private adapter from the global one, and put it into use: the personal step.

        It trains on the device's examples, on what the device was taught and, a classifier, on public phrases
        (``rehearsal``). An interrupted step of the same arguments is continued. A classifier that results answers as
        many other public phrases right as the global adapter (``client.training.personal.personalize``). The adapter is
        not put into use if the global adapter, or the one in use, is better on the held-out examples: answers more of
        them or, of a language model, predicts them better. One in use that differs from the global adapter in its head
        alone is not compared: a regression may have fitted it to the held-out examples.

        Args:
            how: The step; of a language model, its method is fine-tuning.
            learning_rate: Of the first training step; None: ``VIRTUAL_RATE`` of virtual tokens, else ``PERSONAL_RATE``.
            control: Limits of this device; its checkpoint is set here.
            variants: Of each picture or sound of the examples, which are learned as well, at most ``MAX_VARIANTS``.

        Raises:
            DataError: An example is not valid, or a loss is not finite.
            ConfigError: As ``teach``; or the bundle has no global adapter, or several; or a language model has no such
                method.
            OSError: The disk is full, for example.
        """
        origin, begun = self._global_adapter(), time.perf_counter()
        manifest, old = origin.manifest, self.adapter.manifest
        subject = self._subject(manifest)
        step = subject.step(how)
        path = Path(examples)
        device = path.parent / SETTINGS
        data = DeviceSettings.read(device).data if device.is_file() else None
        own = parse_examples(read_clean(path, data), path, len(manifest.labels))
        rate = learning_rate or subject.rate(lesson=False)
        trainer: Any = subject.trainer  # ``step`` asks a language model nothing that only a classifier has
        engine = _graph(trainer)
        start = engine.tensors_of(origin.inputs)
        taught, public = subject.taught(own), subject.public()
        digest = _step_digest(manifest, rate, (how, variants), [*own, *taught, *public])
        chosen = subject.rehearsal([*own, *taught], public)
        every, held_out = [*own, *taught, *chosen.trained], in_split(own, Split.VALIDATION)
        epochs = max(how.epochs, 1)
        task = Task(engine.config, manifest.labels, epochs, BATCH_SIZE, rate, 0.0, 0.0, PARTS, PARTS, variants=variants)
        checkpoint = TrainingCheckpoint(self.folder / TRAINING_STATE, self.keys[1], digest)
        rng, limits = np.random.default_rng(list(digest)), replace(control, checkpoint=checkpoint)
        shared = {Candidate.GLOBAL: start}
        outcome = personalize(trainer, shared, every, task, step, rng=rng, plain=chosen.counted, control=limits)
        before, scores = start, {candidate.value: score for candidate, score in outcome.scores.items()}
        if old.parent and (old.peft_config, old.labels) == (manifest.peft_config, manifest.labels):
            before = engine.tensors_of(self.adapter.inputs)
            if _embeds_otherwise(before, start):
                scores["in use"] = trainer.score(before, held_out)
        is_new = outcome.chosen is Candidate.PERSONAL and subject.is_best(scores)
        others: tuple[Learnt, ...] = ()
        if is_new and manifest.labels:
            others = subject.learnt([*held_out, *chosen.counted[:MAX_TESTED]], before, outcome.judged)
        used = self._put_into_use(manifest, (), engine.inputs_of(outcome.adapter)) if is_new else old
        checkpoint.delete()
        trained, seconds = len(in_split(every, Split.TRAIN)), time.perf_counter() - begun
        return Personalized(used.name, used.version, is_new, seconds, trained, len(held_out), scores, others)

    def _subject(self, manifest: AdapterManifest) -> "_Phrases | _Texts":
        kind = _Texts if self.library.manifest.task == "text-generation" else _Phrases
        return kind(self, manifest)

    def _global_adapter(self) -> VerifiedAdapter:
        if not self.adapter.manifest.parent:
            return self.adapter
        names = [name for name in adapter_names(self.library.bundle) if name != self.target]
        shared = [self.library.trust.adapter(name, self.library.base) for name in names]
        shared = [one for one in shared if not one.manifest.parent]
        if len(shared) > 1:
            shared = [one for one in shared if one.manifest.source == self.adapter.manifest.parent]
        if len(shared) != 1:
            reason = f"{self.library.bundle} does not have the global adapter of {self.adapter.manifest.name!r}"
            raise ConfigError(f"{reason}, or has several: add it", about="adapters")
        return shared[0]

    @property
    def base(self) -> VerifiedBase:
        """Verify the base again after a lesson, which links its files again. Raises as ``Bundle.base``."""
        if self.relinked:
            self.library, self.relinked = replace(self.library, base=self.library.trust.bundle.base()), False
        return self.library.base

    def undo(self) -> Undone:
        """Go back to the adapter before the last lesson. Raises DataError: the adapter in use was not learned here, or
        no lesson is left; TrustError, DataError, ConfigError: the adapter before it is not in the bundle any more, and
        there is no other (``Library.default``); OSError: as ``teach``."""
        lesson, history = self.history.undone()
        if lesson.before is None:
            used = self._shared(lesson.used)  # before anything is removed: there may be none
            self._write({}, removed=self.target)
        else:
            manifest = AdapterManifest.accept(lesson.before.manifest, (*self._trusted(), self.keys[0].public))
            used = replace(manifest, version=self._next())
            self._install(used, lesson.before.blob)
        self._save(history)
        self._use(used.name, history)
        count(self.library.bundle, [lesson_key(undone=True)] * len(lesson.corrections))
        return Undone(used.name, used.version, lesson.corrections)

    def forget(self, erased: Callable[[Correction], bool]) -> None:
        """Delete the private adapter, those before it and the corrections of which ``erased`` is true. ``relearn``
        makes it again. Raises DataError, TrustError, ConfigError as ``undo``, before anything is deleted."""
        lessons = self.history.lessons
        used = self._shared(lessons[0].used if lessons else "") if self.adapter.manifest.parent else None
        self.pending = self.history.without(erased)
        self._save(LessonHistory())
        (self.folder / TRAINING_STATE).unlink(missing_ok=True)
        if used is not None:
            self._write({}, removed=self.target)
            self._use(used.name, LessonHistory())

    def relearn(self, examples: storage.File) -> None:
        """Repeat the lessons that remain after ``forget``, and personal steps with the defaults. A correction that
        cannot be learned now is kept for the next personal step. Raises OSError, TrustError as ``teach``."""
        while self.pending:
            corrections, *self.pending = self.pending
            try:
                if corrections:
                    self.teach(corrections)
                else:
                    self.personalize(examples, PersonalStep(3, 16.0), None)
            except (DataError, ConfigError):
                self.history = self.history.keeping([corrections])
                self._save(self.history)

    def _shared(self, digest: str) -> AdapterManifest:
        """Find the adapter with this SHA-256, else the one to use instead of the private one."""
        manifest_of = self.library.trust.bundle.adapter_manifest
        shared = [manifest_of(name) for name in self.library.names() if name != self.target]
        matching = [one for one in shared if one.sha256 == digest]
        return matching[0] if matching else manifest_of(self.library.default(without=self.target))

    def _put_into_use(
        self, origin: AdapterManifest, corrections: Sequence[Correction], inputs: Tensors
    ) -> AdapterManifest:
        """Put an adapter with these inputs, which was made from ``origin``, into use: a lesson that can be undone."""
        old = self.adapter.manifest
        blob = container.pack(quantize(inputs, "fp32"))
        digest = sha256(blob).hexdigest()
        manifest = replace(
            origin,
            name=self.target,
            sha256=digest,
            size=len(blob),
            format="fp32",
            version=self._next(),
            source=digest,
            parent=origin.parent or origin.source,
            privacy=None,  # nothing bounds what a device fitted to its own examples
            card=None,  # nor has the owner of the shared one released it
        )
        bundle, before = self.library.bundle, None
        if old.name == self.target:
            paths = (bundle / manifest_path(old.name), bundle / adapter_path(old.name))
            before = Before(*(storage.read(path, MAX_FILE) for path in paths))
        lesson = Lesson(tuple(corrections), digest, old.sha256, before)
        self._save(history := self.history.then(lesson))  # first: a lesson that made no adapter is found and left out
        self._install(manifest, blob)
        self._use(manifest.name, history)
        return manifest

    def _use(self, name: str, history: LessonHistory) -> None:
        self.adapter = self.library.trust.adapter(name, self.library.base)
        self.history = history.current(self.adapter.manifest.sha256)

    def _next(self) -> int:
        seen = self.library.trust.seen.highest(self.library.manifest.base_digest, self.target)
        return max(seen, self.adapter.manifest.version) + 1

    def _save(self, history: LessonHistory) -> None:
        storage.replace(self.folder / HISTORY, history.keeping(self.pending).seal(self.keys[1]))

    def _install(self, manifest: AdapterManifest, blob: bytes) -> None:
        key = self.keys[0]
        if key.public not in self._trusted():
            file = self.library.trust.pinned
            pinned = storage.read(file).rstrip() + b"\n" + key.public.to_pem()
            storage.replace(file, pinned, S_IMODE(file.stat().st_mode))
        files = {manifest_path(manifest.name): manifest.sign(key), adapter_path(manifest.name): blob}
        self._write({path.as_posix(): content for path, content in files.items()})

    def _write(self, files: dict[str, bytes], removed: str | None = None) -> None:
        with storage.locked_folder(self.library.bundle) as whole:
            mode = S_IMODE(whole.stat().st_mode)
            with storage.staged(whole, mode=mode, replaces=True) as stage:
                storage.link_files(whole, stage)
                storage.write_files(stage, files)
                for name in files:
                    (stage / name).chmod(storage.PRIVATE)
                for path in (manifest_path(removed), adapter_path(removed)) if removed else ():
                    (stage / path).unlink()
                self.relinked = True

    def _trusted(self) -> tuple[PublicKey, ...]:
        return self.library.trust.bundle.trusted


class _Phrases:
    def __init__(self, learner: Learner, manifest: AdapterManifest) -> None:
        self._learner, self._manifest, self._labels = learner, manifest, manifest.labels

    @cached_property
    def trainer(self) -> ClassifierTrainer:
        return graphengine.classifier(self._learner.base, len(self._labels), stated_config(self._manifest))

    @cached_property
    def reader(self) -> PhraseReader:
        return PhraseReader.of(self._learner.library.base.files[TOKENIZER])

    def rate(self, *, lesson: bool) -> float:
        return LEARNING_RATE if lesson else PERSONAL_RATE

    def step(self, how: PersonalStep) -> PersonalStep:
        return how

    def checked(self, corrections: Sequence[Correction]) -> list[Example]:
        read = dict[tuple[int, ...], str]()
        for number, pair in enumerate(corrections, 1):
            if pair.label not in self._labels:
                names = ", ".join(self._labels[:40])
                reason = f"phrase {number} has the label {pair.label[:40]!r}, which the adapter lacks; it has: {names}"
                raise DataError(reason, about="label")
            if len(pair.text) > (most := longest(pair.text)):
                reason = f"phrase {number} has {len(pair.text)} characters, above the limit of {most}: shorten it"
                raise DataError(reason, about="text")
            if read.setdefault(tuple(self.reader.tokens(pair.text)), pair.label) != pair.label:
                reason = f"phrase {number} is to the model one that has another label: teach it with one label"
                raise DataError(reason, about="corrections")
        return _labelled(corrections, self._labels)

    def others(self, taught: Sequence[Example], compared: Sequence[Example]) -> tuple[list[Example], list[Example]]:
        """Choose what is rehearsed while this is taught, and what is tested: recent corrections, and public phrases."""
        if compared:
            raise ConfigError("--compare is for language models: leave it out", about="--compare")
        corrected = self._learner.history.corrections
        recent = self.trainer.unlike(_labelled(corrected[::-1], self._labels), taught)[: MAX_REHEARSED // 2]
        every = [*taught, *(Example(one.text) for one in corrected)]
        usable = self.trainer.unlike(self.public(), every)
        nearest = in_own_words(self.trainer, usable, every)
        one_each = list({one.label: one for one in (*usable, *reversed(nearest))}.values())
        rehearsed = [*recent, *one_each][:MAX_REHEARSED]
        return rehearsed, [*recent, *(example for example in usable if example not in rehearsed)][:MAX_TESTED]

    def taught(self, own: Sequence[Example]) -> list[Example]:
        """List what the device was taught, as far as its own examples do not say it."""
        return self.trainer.unlike(_labelled(self._learner.history.corrections[::-1], self._labels), own)[::-1]

    def public(self) -> list[Example]:
        base = self._learner.library.base
        public = parse_phrases(base.read(PHRASES), base.folder / PHRASES) if PHRASES in base.manifest.files else []
        readable = [(label, text) for label, text in public if label in self._labels]
        ordered = _in_lesson_order(readable, len(self._learner.history.corrections))
        return [Example(text, self._labels.index(label)) for label, text in ordered]

    def rehearsal(self, examples: Sequence[Example], public: Sequence[Example]) -> Rehearsal:
        return rehearsal(self.trainer, examples, public, PUBLIC_EACH)

    def is_best(self, scores: Mapping[str, Score]) -> bool:
        """Whether the personal adapter, which is better than the global one, is as good as that in use."""
        return "in use" not in scores or scores["personal"].correct >= scores["in use"].correct

    def learnt(self, examples: Sequence[Example], before: Tensors, after: Tensors) -> tuple[Answers, ...]:
        if not examples:
            return ()
        labels, texts = self._labels, [example.text for example in examples]
        rows = (probabilities(self.trainer.logits(one, texts), self._manifest.temperature) for one in (before, after))
        predictions = [[Prediction(labels[int(row.argmax())], float(row.max())) for row in each] for each in rows]
        return tuple(
            Answers(one.text, labels[one.label], old, new, self.reader.unread(one.text, most=MAX_TOKENS))
            for one, old, new in zip(examples, *predictions, strict=True)
        )


class _Texts:
    """What a language model learns from: texts, and answers to prompts. Its methods are those of ``_Phrases``."""

    def __init__(self, learner: Learner, manifest: AdapterManifest) -> None:
        self._learner, self._manifest = learner, manifest

    @cached_property
    def trainer(self) -> LanguageTrainer:
        return graphengine.language(self._learner.base, stated_config(self._manifest))

    def rate(self, *, lesson: bool) -> float:
        if self.trainer.engine.config.num_virtual_tokens:
            return VIRTUAL_RATE
        return LANGUAGE_RATE if lesson else PERSONAL_RATE

    def step(self, how: PersonalStep) -> PersonalStep:
        """Make a personal adapter in any case: ``is_best`` chooses."""
        if how.method != FINE_TUNE:
            raise ConfigError("a language model has no head to fit: leave out --method", about="--method")
        return replace(how, choice=Choice.NEVER)

    def checked(self, corrections: Sequence[Correction]) -> list[Example]:
        special = special_tokens(self._learner.library.base.files[TOKENIZER])
        for number, pair in enumerate(corrections, 1):
            for about, text in (("prompt", pair.text), ("answer", pair.label)):
                if not text.strip() or len(text) > MAX_TEXT:
                    size = f"has {len(text)} characters" if text.strip() else "is empty"
                    reason = f"the {about} of correction {number} {size}: 1 to {MAX_TEXT} can be learned"
                    raise DataError(reason, about=about)
                require_plain(checked(text), special, about)
        return _answering(corrections)

    def others(self, taught: Sequence[Example], compared: Sequence[Example]) -> tuple[list[Example], list[Example]]:
        if cut := [number for number, text in enumerate(self.trainer.encode(taught), 1) if text.cut]:
            reason = f"correction {cut[0]} has more tokens than can be learned: teach a shorter answer"
            raise DataError(reason, about="answer")
        prompts = {one.prompt for one in taught}
        earlier = [one for one in self._learner.history.corrections[::-1] if one.text not in prompts]
        rehearsed = _answering(earlier[:MAX_REHEARSED])
        return rehearsed, [*rehearsed, *compared]

    def taught(self, own: Sequence[Example]) -> list[Example]:
        return _answering(self._learner.history.corrections)

    def public(self) -> list[Example]:
        return []

    def rehearsal(self, examples: Sequence[Example], public: Sequence[Example]) -> Rehearsal:
        return Rehearsal((), ())

    def is_best(self, scores: Mapping[str, Score]) -> bool:
        return scores["personal"].loss <= min(score.loss for score in scores.values())

    def learnt(self, examples: Sequence[Example], before: Tensors, after: Tensors) -> tuple[TextBits, ...]:
        def cost(text: Example) -> TextBits:
            old, new = (self.trainer.score(adapter, [text]) for adapter in (before, after))
            return TextBits(text.prompt, text.text, bits(old), bits(new), new.correct == 1)

        return tuple(map(cost, examples))


def _embeds_otherwise(one: Tensors, other: Tensors) -> bool:
    """Check whether two adapters of one layout differ in more than the head, beyond rounding."""
    shared = (name for name in other if not name.endswith((WEIGHT, BIAS)))
    return not all(np.allclose(one[name], other[name], rtol=1e-4, atol=1e-7) for name in shared)


def bits(score: Score) -> float:
    return score.loss / score.count / math.log(2)


def _graph(trainer: Trainer) -> graphengine.GraphEngine:
    return cast(graphengine.GraphEngine, trainer.engine)


def _answering(corrections: Iterable[Correction]) -> list[Example]:
    return [Example(one.label, prompt=one.text) for one in corrections]


def _labelled(corrections: Sequence[Correction], labels: Sequence[str]) -> list[Example]:
    return [Example(one.text, labels.index(one.label)) for one in corrections if one.label in labels]


def stated_config(manifest: AdapterManifest) -> PeftConfig:
    if manifest.peft_config is None:
        reason = f"adapter {manifest.name!r} does not state its PEFT config, which training needs: export it again"
        raise ConfigError(reason, about="adapter-manifest.peft_config")
    return manifest.peft_config


def _step_digest(
    origin: AdapterManifest, learning_rate: float, how: tuple[PersonalStep, int], examples: Sequence[Example]
) -> bytes:
    """Digest what a personal step depends on: one that was interrupted is continued by its digest."""
    step, variants = how
    settings = [origin.sha256, learning_rate, *map(str, astuple(step)), *([variants] if variants else [])]
    return sha256(jsontext.encode(settings) + encode_examples(examples)).digest()


def _in_lesson_order(phrases: Sequence[tuple[str, str]], lesson: int) -> list[tuple[str, str]]:
    """Order labels and phrases for a lesson, in another order for each number. A generator's order would be NumPy's
    own; digests give the same one in the browser (``page/learning/classifier.js``)."""
    return sorted(phrases, key=lambda pair: sha256("\t".join([str(lesson), *pair]).encode()).digest())


def _keys(folder: Path, entropy: Entropy) -> tuple[IdentityKey, bytes]:
    if not (folder / KEY).exists():
        storage.replace(folder / KEY, IdentityKey.generate(entropy).to_pem())
    return read_key(folder / KEY), sealing_key(folder, entropy)
