"""The folder of a suite: outcomes of trials, one file each, complete or absent; federations; bases."""

import json
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from adapters.storage import PUBLIC, read, replace
from aggregation.errors import DataError
from simulations.suite.outcome import Outcome
from simulations.suite.plan import Trial

LARGEST = 2**26  # bytes of an outcome, which has a character for each answer
RESULTS, FEDERATIONS, BASES = "results", "federations", "bases"  # folders
FINISHED = "finished.json"  # in the folder of a federation: what its rounds cost
_STORED: TypeAdapter[Outcome] = TypeAdapter(Outcome)


class Store:
    """The folder of a suite.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, Outcome] = {}

    def get(self, trial: Trial) -> Outcome | None:
        """The outcome of a trial; None if it is not finished.

        Raises:
            DataError: Its file is damaged.
        """
        if trial.digest in self._found:
            return self._found[trial.digest]
        file = self._file(trial)
        try:
            found = _STORED.validate_json(read(file, LARGEST), strict=True)
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise DataError(
                f"{file} is damaged: delete it, and run the suite again with --resume", about=file.name
            ) from error
        self._found[trial.digest] = found
        return found

    def put(self, trial: Trial, outcome: Outcome) -> None:
        """Keep the outcome of a trial."""
        value = outcome if isinstance(outcome, str) else asdict(outcome)
        self._file(trial).parent.mkdir(exist_ok=True)
        replace(self._file(trial), json.dumps(value, separators=(",", ":")).encode(), PUBLIC)

    def forget(self, trial: Trial) -> None:
        """Remove what ``put`` kept, if it is there."""
        self._found.pop(trial.digest, None)
        self._file(trial).unlink(missing_ok=True)

    def federation(self, trial: Trial) -> Path:
        """The folder of the rounds of a trial."""
        return self.path / FEDERATIONS / trial.federation

    def has_rounds(self, trial: Trial) -> bool:
        """Whether the rounds of a trial are finished, or it has none."""
        return not trial.kind.federated or (self.federation(trial) / FINISHED).exists()

    def _file(self, trial: Trial) -> Path:
        return self.path / RESULTS / f"{trial.digest}.json"
