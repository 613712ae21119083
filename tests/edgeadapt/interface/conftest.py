"""The tiny bases and bundles of ``tests.support.models``."""

from tests.support import models

globals().update(models.FIXTURES)
