"""When a federation evaluates by itself: some hours after a release began to be rolled out, until that is decided.
Nothing is noted but the rounds: what is due follows from the repository of channels and the records of the registry. So
a coordinator after a kill, or one that takes over, neither loses an evaluation nor repeats one that is done."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from aggregation.errors import EdgeAdaptError
from edgeadapt.formats.manifest import RoundRecord
from edgeadapt.releases.repository import ChannelRepository
from edgeadapt.releases.verdict import verdict
from edgeadapt.rounds.evaluation import EvaluationRounds, is_evaluation

VERDICTS = 2  # of a rollout: each finds an equal release worse with a probability of at most 2.5 %


class NextEvaluation(NamedTuple):
    text: str  # for a person: the last verdict, or why nothing is due
    due: datetime | None = None
    pair: tuple[str, str] = ("", "")  # contents of the newest and of the previous release (``EvaluationTask``)


def evaluations(records: Sequence[RoundRecord]) -> int:
    return sum(is_evaluation(record.metrics) for record in records)  # not those that were aborted


def next_evaluation(folder: Path, how: EvaluationRounds, records: Sequence[RoundRecord]) -> NextEvaluation:
    """Say what is due by a schedule. A repository that cannot be read postpones evaluations, and ends no training."""
    try:
        repository = ChannelRepository.open(folder / how.releases, datetime.now(UTC))
        pair, prepared = repository.compared(how.channel, "global"), repository.prepared.read(how.channel)
        last = datetime.fromisoformat(repository.released(how.channel).made).timestamp()
    except (EdgeAdaptError, OSError, ValueError) as error:
        return NextEvaluation(f"no evaluation is due: {error}")
    margin, text = prepared[1].margin if prepared else 0.0, "none of this rollout yet"
    own = [record for record in records if is_evaluation(record.metrics) and (record.ended or 0) >= last]
    said = [verdict(record.metrics, margin) for record in own]
    if own:
        last, text = own[-1].ended or 0, f"round {own[-1].round}, {said[-1] or 'too little was counted'}"
        if any(one and (one.worse or one.low > -margin) for one in said) or sum(map(bool, said)) >= VERDICTS:
            return NextEvaluation(f"evaluation is over: {text}")
    due = datetime.fromtimestamp(last, UTC) + timedelta(hours=how.every)
    return NextEvaluation(f"next evaluation {due:%Y-%m-%dT%H:%M:%SZ}; the last one: {text}", due, pair)
