"""What tests of several packages share. Import it as ``tests.support``; fixtures are in the ``conftest.py`` files."""

from tests.support.errors import refused

__all__ = ["refused"]
