"""The errors of the project. A command prints ``str(error)`` as one line and exits with ``exit_code``.

They live on the ground floor because every part raises them. An aborted round is no error but a value
(``RoundAborted``): it is one of the ways in which a round is expected to end.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class EdgeAdaptError(Exception):
    """Anything a user can cause or mend. The message says what is wrong and what to do, in one line."""

    exit_code = 1


class ProtocolError(EdgeAdaptError):
    """A peer sent what the protocol does not allow. ``peer`` names it where it is known."""

    exit_code = 3

    def __init__(self, message: str, peer: str | None = None) -> None:
        super().__init__(f"{peer}: {message}" if peer else message)
        self.peer = peer


class TrustError(EdgeAdaptError):
    """A file or message is not what a trusted party signed: digest, signature, base, layout or version."""

    exit_code = 4


@contextmanager
def of_file(path: object) -> Iterator[None]:
    """Name the file in whatever is found wrong with what it holds."""
    try:
        yield
    except TrustError as error:
        raise TrustError(f"{path}: {error}") from None


class ConfigError(EdgeAdaptError):
    """A setting is unknown, out of range, or contradicts another."""

    exit_code = 2


class DataError(EdgeAdaptError):
    """Examples, tensors or files that cannot be used: empty, not finite, truncated, of the wrong shape."""

    exit_code = 5
