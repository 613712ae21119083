"""The errors of the project. A command prints ``str(error)`` as one line and exits with ``exit_code``. They are defined
in the lowest package because every package raises them. An aborted round is a value (``server.RoundAborted``), not an
error: it is one of the expected ends of a round."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class EdgeAdaptError(Exception):
    """An error that a user can cause or fix. ``message``: one line: what is wrong, and what to do. ``about``: the
    subject of the error, for programs and tests, which must not depend on the sentence: a field (``plan.round``), a
    setting (``policy.minimum_cohort``), a file's name (``base.onnx``) or an option (``--form``)."""

    exit_code = 1

    def __init__(self, message: str, *, about: str = "") -> None:
        super().__init__(message)
        self.about = about


class ProtocolError(EdgeAdaptError):
    """A peer sent what the protocol does not allow. ``peer`` names it where it is known."""

    exit_code = 3

    def __init__(self, message: str, peer: str | None = None, *, about: str = "") -> None:
        super().__init__(f"{peer}: {message}" if peer else message, about=about)
        self.peer = peer

    @classmethod
    def of(cls, error: EdgeAdaptError, peer: str | None = None) -> "ProtocolError":
        """``error`` as the fault of ``peer``: the same line, the same ``about``."""
        return cls(str(error), peer, about=error.about)

    @staticmethod
    @contextmanager
    def blaming(peer: str | None, kind: type[EdgeAdaptError]) -> Iterator[None]:
        """Make an error of this ``kind`` in the block the fault of ``peer``."""
        try:
            yield
        except kind as error:
            raise ProtocolError.of(error, peer) from None


class TrustError(EdgeAdaptError):
    """A file or message is not what a trusted party signed: digest, signature, base, layout or version."""

    exit_code = 4


@contextmanager
def of_file(path: object) -> Iterator[None]:
    """Put the file's name before the message of a ``TrustError`` about its content."""
    try:
        yield
    except TrustError as error:
        raise TrustError(f"{path}: {error}", about=error.about) from None


class ConfigError(EdgeAdaptError):
    """A setting is unknown, out of range, or contradicts another."""

    exit_code = 2


class DataError(EdgeAdaptError):
    """Examples, tensors or files that cannot be used: empty, not finite, truncated, of the wrong shape."""

    exit_code = 5


def check_fields(of: object, where: str, ranges: Iterable[tuple[str, object, str]], title: str = "") -> None:
    """Check numbers of ``of``: the name of each, whether it is in its range, and what the range is. Raises ConfigError
    for the first that is not, about its name after ``where``; ``title`` begins the message."""
    for name, holds, expected in ranges:
        if not holds:
            raise ConfigError(f"{title}{name} {getattr(of, name)} is not {expected}", about=where + name)


def one_line(error: BaseException) -> str:
    """What a library's error says, on one line of at most 200 characters; its type if it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__
