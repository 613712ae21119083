"""A guard that lets an action happen once: the second attempt is refused."""

from aggregation.errors import ProtocolError


class SingleUse:
    """A flag that is taken once. States are immutable values and could be used twice; the secrets they hold must not
    be.

    The flag belongs to the object, not to the value: a state decrypted from disk has a fresh one. A device therefore
    stores the *next* state before it answers.

    >>> flag = SingleUse()
    >>> flag.take("plan")
    >>> flag.take("plan")
    Traceback (most recent call last):
    aggregation.errors.ProtocolError: this state has already produced its plan; a step is answered once
    """

    __slots__ = ("_taken",)

    def __init__(self) -> None:
        self._taken = False

    def require(self, what: str) -> None:
        """Check that the flag is free. Raises ProtocolError: it was taken."""
        if self._taken:
            message = f"this state has already produced its {what}; a step is answered once"
            raise ProtocolError(message, about="single-use")

    def take(self, what: str) -> None:
        """Take the flag; ``what`` names the action in the error. Raises ProtocolError: it was taken before."""
        self.require(what)
        self._taken = True
