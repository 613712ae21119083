"""The small fleet of tests/aggregation, here too."""

import runpy
from pathlib import Path

_fleet = runpy.run_path(str(Path(__file__).parent.parent / "aggregation" / "conftest.py"))
entropy, fleet_of, spec_of, vector_of = (_fleet[name] for name in ("entropy", "fleet_of", "spec_of", "vector_of"))
