"""The tiny language models of ``tests.support.models``."""

from tests.support import models

make_lm, llama, lm_base = models.make_lm, models.llama, models.lm_base
