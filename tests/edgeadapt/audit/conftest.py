"""Logged sessions to audit."""

from tests.support.fleet import entropy
from tests.support.sessions import logged, logged_of

__all__ = ["entropy", "logged", "logged_of"]
