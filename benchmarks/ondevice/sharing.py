"""One text under several adapters of a base's last layers: `python -m benchmarks ondevice --adapters BASE`.

Ours passes the text through the layers below once. The peers are the whole graph for each adapter, as in bundles
without ``upper.onnx``, and a session of ONNX Runtime for each adapter. All of them take turns within a repeat, each
time with a text that none has read, on one thread; a ratio is one of CPU times within a repeat.
"""

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from aggregation.entropy import SystemEntropy
from aggregation.errors import DataError
from aggregation.pki.identity import IdentityKey
from benchmarks.ondevice.process import resident
from benchmarks.timing import Call, Note, Timing, aligned, interleaved, quartiles
from client.inference.phrases import PhraseReader
from client.inference.session import ClassificationSession
from edgeadapt.bases.base import Base
from edgeadapt.bases.classifiergraph import ClassifierGraph, open_session
from edgeadapt.formats.bundle import MODEL, TOKENIZER, TRUST, UPPER
from edgeadapt.formats.layout import Layout
from edgeadapt.methods import trainable
from edgeadapt.methods.classifier import build, tensors
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.classifier import export_classifier
from export.onnx.exported import Profile
from export.onnx.slotted import with_mean_head
from export.onnx.targets import Slots

LABELS = tuple(f"intent-{i:02d}" for i in range(29))  # as many as the main scenario has
SHARED, ROWS, WHOLE, WHOLE_ROWS, SESSIONS = (
    "shared, one after the other",
    "shared, as rows of a batch",
    "whole graph for each",
    "whole graph, rows of a batch",
    "a session for each",
)


@dataclass(frozen=True, slots=True)
class SharingWorkload:
    layers: int = 3  # the last ones, which have slots
    adapters: tuple[int, ...] = (1, 4, 16)
    repeats: int = 15
    profile: Profile = Profile.NATIVE_INT8


def measure(base: Base, work: SharingWorkload, note: Note) -> dict[str, Any]:
    """Return by number of adapters, and by way: ``cpu_ms`` and ``ms``, each the median, least and largest, and the
    ``ratio`` of CPU time to that of the whole graph, the median and quartiles; and ``session_bytes`` of each further
    session. Raises DataError: the answers of the ways differ."""
    note("export of a base with slots in its last layers")
    slotted = with_mean_head(base, Slots(("query", "value"), first=-work.layers))
    parts = export_classifier(slotted, base, work.profile)
    files = {name: digest for name, digest in parts.manifest.files.items() if name != UPPER}
    whole = replace(parts, manifest=replace(parts.manifest, files=files))
    config = trainable.configuration(base, targets=("query", "value"), layers=work.layers)
    model, rng = build(base, len(LABELS), config), np.random.default_rng(0)
    shapes = {name: value.shape for name, value in tensors(model).items()}
    sources = []
    for number in range(max(work.adapters)):
        values = {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}
        name = f"adapter-{number}"
        sources.append(AdapterSource(name, values, LABELS, 1, Layout.of(values).digest, peft_config=config))
    key = IdentityKey.generate(SystemEntropy())
    with tempfile.TemporaryDirectory(prefix="edgeadapt-bench-") as folder:
        sessions = []
        for name, exported in (("parts", parts), ("whole", whole)):
            bundle = Path(folder) / name / "bundle"
            bundle.parent.mkdir()
            write_bundle(bundle, exported, sources, key=key)
            (bundle.parent / TRUST).write_bytes(key.public.to_pem())
            sessions.append(ClassificationSession.open(bundle))
        return _timed(sessions, [source.name for source in sources], work, note)


def _timed(
    sessions: Sequence[ClassificationSession], names: Sequence[str], work: SharingWorkload, note: Note
) -> dict[str, Any]:
    held, numbers, found = resident("VmRSS"), count(), dict[str, Any]()
    single = {name: _alone(sessions[1], name) for name in names}
    each = (resident("VmRSS") - held) / len(names)
    for adapters in work.adapters:
        note(f"one text under {adapters} adapters")
        ways = _ways(sessions, names[:adapters], single)
        text = _text(next(numbers))
        if not ways[SHARED](text) == ways[WHOLE](text):
            raise DataError("the answers from states differ from those of the whole graph", about=UPPER)
        ways[SESSIONS](text)  # warm-up
        calls = [Call(run, lambda: _text(next(numbers)), work.repeats) for run in ways.values()]
        timings = dict(zip(ways, interleaved(*calls), strict=True))
        found[str(adapters)] = {way: _figures(timing, timings[WHOLE]) for way, timing in timings.items()}
    return {"layers": work.layers, "repeats": work.repeats, "session_bytes": each, "adapters": found}


def _ways(
    sessions: Sequence[ClassificationSession], names: Sequence[str], single: Mapping[str, Callable[[str], Any]]
) -> dict[str, Callable[[str], list[Any]]]:
    """Return what answers a text by all of these adapters; two of them with the same numbers."""
    shared, whole = sessions
    return {
        SHARED: lambda text: [shared.rank([text], name, 1)[0] for name in names],
        ROWS: lambda text: shared.rank_mixed([(text, name) for name in names], 1),
        WHOLE: lambda text: [whole.rank([text], name, 1)[0] for name in names],
        WHOLE_ROWS: lambda text: whole.rank_mixed([(text, name) for name in names], 1),
        SESSIONS: lambda text: [single[name](text) for name in names],
    }


def _alone(session: ClassificationSession, name: str) -> Callable[[str], Any]:
    """Open a session of ONNX Runtime of its own for an adapter."""
    base, manifest = session.library.base, session.library.manifest
    own = open_session(base.files[MODEL], base.folder, manifest.slots)
    graph = ClassifierGraph(own, manifest.slots, manifest.independent_rows)
    reader, feeds = PhraseReader.of(base.files[TOKENIZER]), graph.feeds(session.load(name).inputs)
    return lambda text: graph.logits(reader.tokens(text), feeds)


def _text(number: int) -> str:
    return f"turn on light {number:06d} in the kitchen, and close the blinds"


def _figures(timing: Timing, peer: Timing) -> dict[str, Any]:
    ratios = [ours / theirs for ours, theirs in zip(timing.cpu, peer.cpu, strict=True)]
    return {
        "ms": [timing.ms, min(timing.wall), max(timing.wall)],
        "cpu_ms": [timing.cpu_ms, min(timing.cpu), max(timing.cpu)],
        "ratio": [statistics.median(ratios), *quartiles(ratios)],
    }


def table(found: Mapping[str, Any]) -> str:
    rows = [("one text, CPU ms", "adapters", "median (least–largest)", "of the whole graph's (quartiles)")]
    for adapters, ways in found["adapters"].items():
        for way, figures in ways.items():
            cells = [_cell(figures["cpu_ms"], 1), _cell(figures["ratio"], 2)]
            rows.append((way, adapters, *cells))
    sizes = f"Each further session takes {found['session_bytes'] / 1e6:.0f} MB."
    return (
        f"{aligned(rows)}\n\nSlots in the last {found['layers']} layers; {found['repeats']} repeats, each with other "
        f"texts; one thread. {sizes}"
    )


def _cell(values: Sequence[float], digits: int) -> str:
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low}–{high})"
