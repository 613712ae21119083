"""From the sum to the adapter, once more: what an auditor can say about the step that no transcript holds.

A transcript ends with the digest of a sum and that of the adapter that is said to have come of it. With the published
files (``adapters.registryfiles``) three things can be checked:

- each adapter that a log names was published under the coordinator's signature, for these very survivors, and its file
  is unaltered;
- where the masked updates were kept, so that the sum was added up again: that the server's rule makes this adapter of
  it, bit for bit. FedAvg needs the adapter before and nothing else;
- FedAdam remembers two running means. They start from nothing at version 0, so its steps can be made again where no
  sum since then is missing, and from no other point.

The rule itself is what the operator's settings say: an auditor sees whether it was kept to, not whether anyone agreed.
"""

from dataclasses import dataclass, field

import numpy as np

from adapters.layout import Floats, Layout
from adapters.manifest import VersionManifest
from adapters.registryfiles import RegistryFiles
from aggregation.errors import DataError, TrustError
from coordinator import optimizer
from coordinator.audit.auditor import Check, Finding, Made, Status, many
from coordinator.audit.report import Problem
from coordinator.optimizer import Stateless
from coordinator.settings import SETTINGS

DIGESTS_ONLY = "the masked updates were kept as digests only"
UNPUBLISHED = "the coordinator stopped before it had published the last one"
REPLACED = "another one was published under the number of the last, as after a stop: a later session's log must name it"
UNKNOWN_STATE = "what FedAdam remembers of earlier rounds is in no transcript, and a sum since version 0 is missing"


@dataclass(slots=True)
class Remake:
    """Follows the published adapters through a coordinator's sessions, in order.

    Args:
        registry: What the coordinator published.
        rule: The server's, as the operator's settings say.
        state: Of the server's optimizer after the step that was made again last, and the version that it made.
        undone: The last adapter, where it is not what was published: the next session must start where it did.
    """

    registry: RegistryFiles
    rule: optimizer.Settings
    state: tuple[int, optimizer.State] | None = field(default=None, repr=False)
    undone: Made | None = None

    def check(self, made: tuple[Made, ...]) -> Finding:
        """The adapters of one session."""
        reasons: list[str] = []
        for each in made:
            try:
                reasons.append(self._step(each, each is made[-1]))
            except Problem as problem:
                return Finding(Check.ADAPTERS, Status.FAIL, str(problem), problem.place)
            except (DataError, TrustError) as error:
                return Finding(Check.ADAPTERS, Status.FAIL, f"{each.place}: {error}", each.place)
        return Finding(Check.ADAPTERS, *self._told(reasons))

    def _told(self, reasons: list[str]) -> tuple[Status, str]:
        """In words. ``reasons``: of each adapter why its step could not be made again; empty where it was."""
        if not reasons:
            return Status.PASS, "no adapter was made"
        again, published = reasons.count(""), len(reasons) - reasons.count(UNPUBLISHED) - reasons.count(REPLACED)
        text = f"{many(published, 'adapter')}, published under the coordinator's signature and unaltered since"
        if again:
            which = "Made" if again == len(reasons) else f"{again} of {len(reasons)}, made"
            text += f". {which} again from the sums by the server's rule: the same bit for bit ({self._rule})"
        if again < len(reasons):
            why = "; ".join(sorted(set(reasons) - {""}))
            text += f". Not shown of {len(reasons) - again}, that the sum made it: {why}"
        return Status.PASS if again else Status.SKIPPED, text

    @property
    def _rule(self) -> str:
        return f"{type(self.rule).__name__} at rate {self.rule.learning_rate:g}, as {SETTINGS} says"

    def _step(self, made: Made, last: bool) -> str:
        """Check one adapter; why its step could not be made again, or nothing.

        Raises:
            Problem: It is not what was published, or not what the rule makes of the sum.
        """
        if self.undone is not None and made.before != self.undone.before:
            raise Problem(f"the devices got an adapter {made.before[0]} that no log made", made.place)
        self.undone = None
        said = self.registry.manifest(made.after[0])
        # The log is written first: a kill in between leaves a last adapter that is not published.
        if last and (said is None or said.sha256 != made.after[1]):
            self.undone = made
            return REPLACED if said else UNPUBLISHED
        parent = self.registry.manifest(made.before[0])
        if parent is None or parent.sha256 != made.before[1]:
            raise Problem(f"the devices got another adapter than was published as {made.before[0]}", made.place)
        before, after = (self.registry.tensors(each) for each in (parent, _agree(made, said)))
        layout = Layout.of(before)
        if not Layout.of(after).digest == layout.digest == made.layout:
            raise Problem("the adapter has another layout than the session was for", made.place)
        if made.values is None:
            return DIGESTS_ONLY
        state = self._before(made, layout.size)
        if state is None:
            return UNKNOWN_STATE
        after_state, expected = optimizer.step(self.rule, state, layout.flatten(before), _mean(made))
        if expected.tobytes() != layout.flatten(after).tobytes():
            raise Problem(f"adapter {made.after[0]} is not what the rule makes of the sum ({self._rule})", made.place)
        self.state = made.after[0], after_state
        return ""

    def _before(self, made: Made, size: int) -> optimizer.State | None:
        """What the optimizer remembered before this step, where that is known."""
        start = optimizer.start(self.rule, size)
        if isinstance(start, Stateless) or made.before[0] == 0:
            return start
        return self.state[1] if self.state is not None and self.state[0] == made.before[0] else None


def _agree(made: Made, said: VersionManifest | None) -> VersionManifest:
    """The manifest, which says the same as the log."""
    version, digest = made.after
    if said is None:
        raise Problem(f"adapter {version} is not in the registry", made.place)
    expected = {
        "version": version,
        "sha256": digest,
        "parent": made.before[1],
        "survivors": made.survivors,
        "layout_digest": made.layout,
    }
    for name, value in expected.items():
        if getattr(said, name) != value:
            raise Problem(f"the manifest of adapter {version} says another {name} than the log", made.place)
    return said


def _mean(made: Made) -> Floats:
    """As ``coordinator.rounds`` takes it: the summed delta over the summed examples, which are a whole number."""
    values = made.values or {}
    if not {"delta", "weight"} <= set(values) or np.rint(values["weight"][0]) < 1:
        raise Problem("what was summed is no update with its examples", made.place)
    mean: Floats = (values["delta"] / float(np.rint(values["weight"][0]))).astype(np.float32)
    return mean
