"""Logged sessions to audit."""

from tests.support.sessions import logged

__all__ = ["logged"]
