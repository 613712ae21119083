"""The step from a round's sum to its adapter, recomputed with the registry: a transcript does not contain it.

With the registry (``edgeadapt.formats.registryfiles``) four things can be checked:

- each adapter that a log names was published under the coordinator's signature, for exactly this plan and these
  survivors, and its file is unaltered; what a round does not change is as in the previous adapter;
- the devices were given a task for this adapter, with its labels, in every round, also an aborted one;
- if the masked updates were kept, so that the sum could be recomputed: the metrics in the manifest are those of the
  sum, and the server optimizer turns it into this adapter, bit for bit. FedAvg needs only the previous adapter;
- FedAdam has two moments as state, which start from constants at version 0 and on another base. Its steps can be
  recomputed if no sum since then is missing, and not otherwise.

An audit shows whether the coordinator followed the rules that its manifests name, not whether anyone agreed to them."""

from dataclasses import dataclass, field, replace

from aggregation.errors import ConfigError, DataError, TrustError
from aggregation.groups import total
from aggregation.policy import Policy
from aggregation.transcript.entries import AdapterId, Place
from edgeadapt.auditing.findings import Check, Finding, Problem, ProducedAdapter, Report, Status, count
from edgeadapt.formats.layout import Layout
from edgeadapt.formats.manifest import VersionManifest
from edgeadapt.formats.registryfiles import RegistryFiles
from edgeadapt.rounds import combination, optimizer, taskkinds
from edgeadapt.rounds.roundtask import RoundTask, ServerStep, SummedRound, distance
from edgeadapt.rounds.taskkinds import KINDS

UNCHANGED = ("base_digest", "layout_digest", "peft_config", "labels")  # fields of a manifest that no round changes

# Why the step of an adapter could not be recomputed: for programs → for people.
REASONS = {
    "vectors": "only digests of the masked updates were kept",
    "optimizer": "the state of FedAdam is in no transcript, and a sum since version 0 is missing",
}


@dataclass(slots=True)
class Recomputation:
    """Follows the published adapters through a coordinator's sessions, in order. ``state``: the version that was
    recomputed last, and the optimizer's state after it. ``still``: each round of the last session that hardly moved its
    adapter, and how far."""

    registry: RegistryFiles
    state: tuple[int, optimizer.State] | None = field(default=None, repr=False)
    rules: set[optimizer.ServerOptimizer] = field(default_factory=set)
    still: dict[int, str] = field(default_factory=dict)

    def check(self, report: Report) -> Finding:
        """Check the adapters of one session: the one that it started from, and those that it made. Rounds that were
        aborted had one of these (``rules.results``)."""
        reasons: list[str] = []
        self.rules.clear()
        self.still.clear()
        place: Place | None = None
        moved = ""
        try:
            if report.start is not None:
                started = self._started(report, report.start)
                begins = f"adapter {started.version} is the first on its base, and of no round. "
                moved = begins if started.version and started.plan is None else ""
                for place, task in report.tasks:
                    _require_task(started, place, task)
            for produced in report.produced:
                place = produced.place
                reasons.append(self._step(produced))
        except Problem as problem:
            return Finding(Check.ADAPTERS, Status.FAIL, str(problem), problem.place, problem.about)
        except (DataError, TrustError) as error:
            text = f"{place}: {error}" if place else str(error)
            return Finding(Check.ADAPTERS, Status.FAIL, text, place, error.about)
        finding = self._summary(reasons)
        return replace(finding, text=moved + finding.text)

    def _started(self, report: Report, start: AdapterId) -> VersionManifest:
        manifest = self.registry.manifest(start[0])
        if manifest is None or manifest.id != start:
            text = f"the session started from another adapter than was published as {start[0]}"
            raise Problem("checkpoint.adapter", text)
        self.registry.tensors(manifest)
        for name, offered in {"base_digest": report.base, "layout_digest": report.layout}.items():
            if getattr(manifest, name) != offered:
                text = f"the session's offer and the manifest of adapter {start[0]} differ in {name}"
                raise Problem(f"manifest.{name}", text)
        return manifest

    def _summary(self, reasons: list[str]) -> Finding:
        if not reasons:
            return Finding(Check.ADAPTERS, Status.PASS, "no adapter was produced")
        again, why = reasons.count(""), sorted(set(reasons) - {""})
        text = f"{count(len(reasons), 'adapter')} published under the coordinator's signature and unaltered since"
        if again:
            rules = "; ".join(sorted(map(str, self.rules)))
            text += f". {again} of {len(reasons)} recomputed from the sums, equal bit for bit ({rules})"
        if why:
            lacking = "; ".join(REASONS[reason] for reason in why)
            text += f". {len(reasons) - again} of {len(reasons)} not recomputed: {lacking}"
        return Finding(Check.ADAPTERS, Status.SKIPPED if why else Status.PASS, text, about=", ".join(why))

    def _step(self, produced: ProducedAdapter) -> str:
        """Check one adapter. Returns a key of ``REASONS``, or nothing if the step was recomputed."""
        place, (start, start_digest), (version, _) = produced.place, produced.before, produced.after
        manifest, parent = self.registry.manifest(version), self.registry.manifest(start)
        if parent is None or parent.sha256 != start_digest:
            raise Problem("plan.adapter", f"the devices got another adapter than was published as {start}", place)
        agreeing = _agreeing(produced, manifest, parent)
        rule = _rule(agreeing, place)
        before, after = (self.registry.tensors(each) for each in (parent, agreeing))
        layout = Layout.of(before)
        if not Layout.of(after).digest == layout.digest == produced.spec.layout_digest:
            raise Problem("layout_digest", "the adapter has another layout than the session's offer", place)
        task = taskkinds.decode(produced.training)  # of a plan that ``check`` has read
        if rule != task.RULE and (task.RULE or rule in [kind.RULE for kind in KINDS]):
            text = f"the manifest of adapter {version} names another rule ({rule}) than its task has"
            raise Problem("manifest.rule", text, place)
        if task.state_size(layout) and produced.spec.privacy is None:
            self._measure(produced, task, distance(before, after, task.influencing()))
        if produced.sums is None:
            return "vectors"
        how = _combination(agreeing, produced)
        begun, survivors = bytes.fromhex(start_digest), len(produced.survivors)
        if agreeing.metrics != task.metrics(produced.spec, total(produced.sums), survivors, begun):
            raise Problem("manifest.metrics", f"the metrics of adapter {version} are not those of the sum", place)
        state = self._state_before(rule, produced, parent, task.state_size(layout))
        if state is None:
            return "optimizer"
        summed = SummedRound(produced.spec, before, begun, produced.sums)
        after_state, expected = task.next_adapter(summed, ServerStep(rule, state, how))
        if layout.flatten(expected).tobytes() != layout.flatten(after).tobytes():
            text = f"adapter {version} is not what the server optimizer of its manifest computes from the sum ({rule})"
            raise Problem("result.adapter", text, place)
        self.state = version, after_state
        self.rules.add(rule)
        return ""

    def _measure(self, produced: ProducedAdapter, task: RoundTask, moved: float) -> None:
        """Note the round if a device with the default policy takes both of its adapters for the same one."""
        spec = produced.spec
        least = task.least_movement(spec.clip_norm, spec.vector.segments[0].size, Policy().minimum_movement)
        if moved < least:
            self.still[produced.place.round] = f"by {moved:.2g}, less than {least:.2g}"

    def _state_before(
        self, rule: optimizer.ServerOptimizer, produced: ProducedAdapter, parent: VersionManifest, size: int
    ) -> optimizer.State | None:
        start, last = optimizer.start(rule, size), self.state
        if not start or parent.plan is None:
            return start
        if last is None or last[0] != produced.before[0]:
            return None
        return last[1] or start  # after FedAvg, FedAdam starts from its first state


def _require_task(manifest: VersionManifest, place: Place, encoded: bytes) -> None:
    """Check that a training task is for the adapters of a session. No round changes the fields ``UNCHANGED``. Otherwise
    devices may answer by whether they have examples of a label."""
    with Problem.at(place):
        task = taskkinds.decode(encoded)
    for name in ("peft_config", "labels"):
        if getattr(task, name) != getattr(manifest, name):
            reason = f"task.{name}"
            raise Problem(reason, f"the task of the plan and the manifest of its adapter differ in {name}", place)


def _agreeing(produced: ProducedAdapter, manifest: VersionManifest | None, parent: VersionManifest) -> VersionManifest:
    """Check that the registry's manifest of an adapter agrees with the log and with the previous one; return it."""
    version, digest = produced.after
    if manifest is None:
        raise Problem("version", f"adapter {version} is not in the registry", produced.place)
    expected = {
        "version": version,
        "sha256": digest,
        "parent": produced.before[1],
        "plan": produced.plan,
        "survivors": produced.survivors,
        "layout_digest": produced.spec.layout_digest,
        "base_digest": produced.spec.base_digest,
    }
    for name, value in expected.items():
        if getattr(manifest, name) != value:
            text = f"the manifest of adapter {version} and the log differ in {name}"
            raise Problem(f"manifest.{name}", text, produced.place)
    changed = [name for name in UNCHANGED if getattr(manifest, name) != getattr(parent, name)]
    changed += ["round"] if manifest.round <= parent.round else []
    for name in changed:
        text = f"the manifests of adapters {parent.version} and {version} contradict each other in {name}"
        raise Problem(f"manifest.{name}", text, produced.place)
    return manifest


def _rule(manifest: VersionManifest, place: Place) -> optimizer.ServerOptimizer:
    try:
        if manifest.rule is not None:
            return optimizer.of_rule(manifest.rule)
        text = "it names none"
    except ConfigError as error:
        text = str(error)
    raise Problem("manifest.rule", f"the server optimizer of adapter {manifest.version}: {text}", place)


def _combination(manifest: VersionManifest, produced: ProducedAdapter) -> combination.Combination | None:
    """Return how the means of groups made an adapter, by its manifest; None if its round had one sum."""
    about = "manifest.combination"
    if (manifest.combination is None) != (produced.spec.grouping is None):
        text = f"the manifest of adapter {manifest.version} and the session's offer differ in whether there are groups"
        raise Problem(about, text, produced.place)
    try:
        return None if manifest.combination is None else combination.of_rule(manifest.combination)
    except ConfigError as error:
        raise Problem(about, f"the combination of adapter {manifest.version}: {error}", produced.place) from None
