"""The tiny language models of ``tests.support.models``."""

from tests.support import models

make_lm, llama = models.make_lm, models.llama
