"""The tiny classifier and its export."""

from tests.support import models

tiny_base, model, exported = models.tiny_base, models.model, models.exported
