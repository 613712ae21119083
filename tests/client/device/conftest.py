"""The device's tests use the tiny base and bundle of the exporter's tests: one exported graph for both."""

import importlib.util
from pathlib import Path

_SHARED = Path(__file__).parents[2] / "export" / "conftest.py"
_spec = importlib.util.spec_from_file_location("tiny_base_fixtures", _SHARED)
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

for _name in ("tiny_base", "model", "exported", "exported_int8", "vendor", "household", "source", "bundle"):
    globals()[_name] = getattr(_module, _name)
