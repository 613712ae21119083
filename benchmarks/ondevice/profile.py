"""Where the time of a start, the memory of a process and the time of a token go: `python -m benchmarks profile`.

A process of its own opens a bundle as `edgeadapt device chat` does and writes tokens. Then it opens the bundle again
and writes as many in ONNX Runtime's profiler, which takes about as long for a node as a small node itself: what the
cheapest kind of operator takes is subtracted from the time of each node. So an operator that does nothing counts as
nothing, and what is left of a token's time, measured without the profiler, is not attributed.

Another process does the same with onnxruntime-genai alone, without signatures and adapters: what the library takes.
"""

import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.ondevice.process import answer_once, in_process, resident
from benchmarks.timing import aligned

TEXT = "Turn on the lights in the kitchen, and tell me when the washing machine is done. " * 8
PROMPT = 32  # tokens
ADAPTER, LOGITS = "of the adapter", "of the logits"
LORA = (".lora_A", ".lora_B", ".add")  # end the names of the nodes that ``export.onnx.matmuls.insert_lora`` adds
Event = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StartStage:
    """A stage of a start: wall-clock seconds, CPU seconds of all threads, and the memory after it (0 outside Linux)."""

    name: str
    seconds: float
    cpu: float
    resident: int  # bytes


@dataclass(frozen=True, slots=True)
class OperatorTime:
    """The nodes of one kind, and their seconds for one token, without what the profiler takes."""

    name: str
    nodes: int
    seconds: float


def profile(bundle: Path, trust: Path | None, adapter: str | None, tokens: int, threads: int) -> dict[str, Any]:
    """Measure how a bundle of a language model answers with ``adapter``, or None for the bare base.

    Returns ``stages`` (``StartStage``) in order; ``operators`` (``OperatorTime``), slowest first; seconds per token:
    ``token_s``, ``token_cpu_s``, in the profiler ``profiled_s``, and of that outside of the graph ``outside_s``;
    ``session_s`` to load the graph, and ``weights_bytes`` that it then holds; ``library``, the ``StartStage`` of
    onnxruntime-genai alone to its first token.
    """
    from edgeadapt.formats.bundle import BASE  # here, so that the processes that are measured do not import it first

    given = {"bundle": str(bundle), "trust": trust and str(trust), "adapter": adapter, "tokens": tokens}
    found = in_process(__name__, given | {"threads": threads})
    return found | {"library": in_process(__name__, {"library": str(bundle / BASE), "threads": threads})}


def operators(events: Iterable[Event], runs: int) -> list[OperatorTime]:
    """Sum the profiler's time by kind of operator, slowest first: the median of the last ``runs`` of the graph."""
    nodes: dict[tuple[str, str], list[Event]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes[event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]].append(event)
    medians = {node: statistics.median(one["dur"] for one in found[-runs:]) / 1e6 for node, found in nodes.items()}
    by_type: dict[str, list[float]] = defaultdict(list)
    for (_, kind), seconds in medians.items():
        by_type[kind].append(seconds)
    cheapest = min(statistics.median(seconds) for seconds in by_type.values())
    matmuls = [node for node in nodes if "MatMul" in node[1]]
    logits = max(matmuls, key=lambda node: int(nodes[node][-1]["args"]["output_size"]), default=None)
    grouped: dict[str, list[float]] = defaultdict(list)
    for node, seconds in medians.items():
        name, kind = node
        place = f", {LOGITS}" if node == logits else f", {ADAPTER}" if name.endswith(LORA) else ""
        grouped[kind + place].append(max(0.0, seconds - cheapest))
    found = [OperatorTime(kind, len(seconds), sum(seconds)) for kind, seconds in grouped.items()]
    return sorted(found, key=lambda one: -one.seconds)


def table(found: Mapping[str, Any]) -> str:
    rows = [("start", "wall ms", "CPU ms", "resident MB")]
    for stage in [*found["stages"], found["library"]]:
        times = f"{1e3 * stage['seconds']:.0f}", f"{1e3 * stage['cpu']:.0f}"
        rows.append((stage["name"], *times, f"{stage['resident'] / 1e6:.0f}"))
    rows += [("", "", "", ""), ("one token", "nodes", "ms", "share")]
    whole, parts = found["token_s"], [(one["name"], one["nodes"], one["seconds"]) for one in found["operators"]]
    parts.append(("outside of the graph", "", found["outside_s"]))
    parts += [("not attributed", "", whole - sum(part[2] for part in parts)), ("in all", "", whole)]
    rows += [(name, str(nodes), f"{1e3 * seconds:.3f}", f"{seconds / whole:.1%}") for name, nodes, seconds in parts]
    per_token = f"A token takes {1e3 * found['token_cpu_s']:.1f} ms of CPU time, and {1e3 * found['profiled_s']:.1f} ms"
    load = f"The graph is loaded in {1e3 * found['session_s']:.0f} ms, which include rearranging the weights"
    weights = f"{load}, and then holds {found['weights_bytes'] / 1e6:.0f} MB."
    return f"{aligned(rows)}\n\n{per_token} in the profiler.\n{weights}"


@dataclass(slots=True)
class _Clock:
    begun: float  # of time.monotonic, which all processes of a machine share
    cpu: float = 0.0
    stages: list[StartStage] = field(default_factory=list)

    def mark(self, name: str) -> None:
        now, busy = time.monotonic(), time.process_time()
        self.stages.append(StartStage(name, now - self.begun, busy - self.cpu, resident("VmRSS")))
        self.begun, self.cpu = now, busy


def _measured(
    bundle: str, trust: str | None, adapter: str | None, tokens: int, threads: int, begun: float
) -> dict[str, Any]:
    """What ``profile`` returns, of this process. Raises the client's errors."""
    clock = _Clock(begun)
    clock.mark("interpreter and numpy")
    from client.inference.engine import GenerationEngine, append
    from client.inference.library import Composition, Library
    from client.inference.text import SamplingParams

    clock.mark("imports")
    library = Library.open(Path(bundle), None if trust is None else Path(trust), "text-generation")
    clock.mark("verification")
    engine = GenerationEngine(library.base, threads)
    library.base.check()
    clock.mark("model and tokenizer")
    prompt = engine.encode(TEXT)[: min(PROMPT, engine.context // 4)]
    count = min(tokens, engine.context - len(prompt) - 1)
    params = SamplingParams(max_tokens=len(prompt) + count + 1)
    loaded = None if adapter is None else library.load(Composition.of(adapter))

    def write(engine: GenerationEngine, marks: _Clock | None = None) -> list[float]:
        if loaded is not None:
            engine.load(loaded)
            if marks:
                marks.mark("adapter")
        inner = engine.inner(params, None if loaded is None else loaded.name)
        append(inner, prompt)
        inner.generate_next_token()
        if marks:
            marks.mark(f"first token after {len(prompt)}")
        seconds = []
        for _ in range(count):
            begun = time.perf_counter()
            inner.generate_next_token()
            seconds.append(time.perf_counter() - begun)
        if marks:
            marks.mark(f"{count} tokens")
        return seconds

    plain = write(engine, clock)
    del engine
    with TemporaryDirectory(prefix="edgeadapt-") as folder:
        profiled = GenerationEngine(library.base, threads, {"enable_profiling": str(Path(folder) / "profile")})
        slow = write(profiled)
        del profiled  # writes the file
        events = json.loads(next(iter(Path(folder).iterdir())).read_bytes())
    runs = [event["dur"] / 1e6 for event in events if event["name"] == "model_run"][-count:]
    nodes = [event for event in events if event.get("cat") == "Node"]
    return {
        "stages": [asdict(stage) for stage in clock.stages],
        "operators": [asdict(one) for one in operators(events, count)],
        "token_s": statistics.median(plain),
        "token_cpu_s": clock.stages[-1].cpu / count,
        "profiled_s": statistics.median(slow),
        "outside_s": max(0.0, statistics.median(slow) - statistics.median(runs)),
        "session_s": sum(e["dur"] for e in events if e["name"] in ("session_initialization", "model_loading_uri"))
        / 1e6,
        "weights_bytes": int(nodes[0]["args"]["mem_bytes_in_use"]),
    }


def _library(library: str, threads: int, begun: float) -> dict[str, Any]:
    """onnxruntime-genai alone, from the start of its process to a token after ``PROMPT``."""
    clock = _Clock(begun)
    import numpy as np
    import onnxruntime_genai as og

    og.disable_telemetry_events()
    config = og.Config(library)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)
    prompt = og.Tokenizer(model).encode(TEXT)[:PROMPT]
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + 1)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array(prompt, np.int32))
    generator.generate_next_token()
    clock.mark(f"onnxruntime-genai alone, to a token after {len(prompt)}")
    return asdict(clock.stages[0])


if __name__ == "__main__":
    answer_once(_library if "library" in json.loads(sys.argv[1]) else _measured)
