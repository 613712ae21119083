"""The tiny bases and bundles of ``tests.support.models``."""

from tests.support import models

tiny_base, model, source, bundle = models.tiny_base, models.model, models.source, models.bundle
exported, exported_int8, with_anna = models.exported, models.exported_int8, models.with_anna
trace_once = models.trace_once
vendor, household, add = models.vendor, models.household, models.add
make_lm, lm_base, lm_model = models.make_lm, models.lm_base, models.lm_model
lm_exported, lm_source, lm_bundle = models.lm_exported, models.lm_source, models.lm_bundle
engine, generator = models.engine, models.generator
