"""A latch: what may be done once from a state is refused the second time."""

from aggregation.errors import ProtocolError


class SingleUse:
    """Open until taken. States are values and could be used twice; what they hold must not answer twice.

    It lives with the object, not with the value: a state restored from its seal has a fresh one, which is why a
    device seals the *next* state before it answers.
    """

    __slots__ = ("_taken",)

    def __init__(self) -> None:
        self._taken = False

    def require(self, what: str) -> None:
        """Return while it is open.

        Raises:
            ProtocolError: It was taken.
        """
        if self._taken:
            raise ProtocolError(f"the {what} of this state was given already; a step is never answered twice")

    def take(self, what: str) -> None:
        """Return the first time.

        Raises:
            ProtocolError: Every time after it.
        """
        self.require(what)
        self._taken = True
