"""The training of an adapter on one base by both engines: `python -m benchmarks training`.

Each run is a process of its own, as on a device that starts for it: torch on the base itself, or ONNX Runtime on the
training graph of a bundle. The texts are drawn from a few words, since the work does not depend on them, and both
engines get the same batches in the same order.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from aggregation.errors import ConfigError, DataError
from benchmarks.ondevice.process import QUIET, answer_once, in_process, resident
from benchmarks.timing import Note, aligned, in_turn, spread_text
from client.inference.trust import Trust
from client.training.control import TrainingControl
from client.training.engine import trainer_of
from client.training.examples import Example
from edgeadapt.bases.base import find_base
from edgeadapt.formats.bundle import BASE, TOKENIZER, Bundle
from edgeadapt.formats.graphinputs import LORA_A
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.parts import PARTS
from edgeadapt.rounds.task import Task

ENGINES = ("onnx", "torch")
TEXT = "turn on the lights in the kitchen and tell me when the washing machine is done with it tomorrow"
LABELS = 29  # of a classifier
ALPHA = 16
RATE = 1e-3
FIGURES = ("tokens_per_second", "tokens_per_cpu_second", "first_step", "first_step_cpu", "memory", "loss")


@dataclass(frozen=True, slots=True)
class TrainingWorkload:
    """What each run trains: LoRA of a rank on texts of as many words, in one epoch."""

    texts: int = 24
    words: int = 48
    batch: int = 4
    rank: int = 8
    repeats: int = 3


QUICK = TrainingWorkload(texts=4, words=4, batch=2, repeats=1)


def compare(bundle: Path, trust: Path | None, base: str, work: TrainingWorkload, note: Note) -> dict[str, Any]:
    """Measure both engines in turn, and return the figures as JSON has them; ``base`` is what torch trains.

    They are ``work``; of each engine in ``ENGINES`` the median, smallest and largest of ``FIGURES``: tokens a second of
    wall and of CPU time, seconds from the start of the process to the end of the first step, peak memory in bytes (0
    outside Linux), and the mean loss of the trained adapter on the texts; ``ratios`` of the medians, onnx / torch.
    """
    manifest = _bundle(bundle, trust).base_manifest()
    if manifest.base_digest != find_base(base).digest:
        raise ConfigError(f"the bundle {bundle} was made of another base than {base}", about="--base")
    given = {"bundle": str(bundle), "trust": trust and str(trust), "base": base, **asdict(work)}
    sides = in_turn(ENGINES, work.repeats, lambda engine: _run(given | {"engine": engine}), note)
    ours, theirs = (sides[engine] for engine in ENGINES)
    ratios = {name: ours[name]["median"] / theirs[name]["median"] for name in FIGURES if theirs[name]["median"]}
    return {"work": asdict(work), "task": manifest.task, "profile": manifest.profile, **sides, "ratios": ratios}


def table(found: Mapping[str, Any]) -> str:
    figures = (
        ("tokens a second", "tokens_per_second", 1.0),
        ("tokens a second of CPU time", "tokens_per_cpu_second", 1.0),
        ("start to the end of the first step, s", "first_step", 1.0),
        ("the same, CPU s", "first_step_cpu", 1.0),
        ("peak memory, MiB", "memory", 2.0**20),
        ("loss of the trained adapter", "loss", 1.0),
    )
    work, rows = found["work"], [["", *ENGINES, " / ".join(ENGINES)]]
    for title, name, unit in figures:
        cells = (spread_text(found[engine][name], unit) for engine in ENGINES)
        rows.append([title, *cells, f"{found['ratios'][name]:.3f}" if name in found["ratios"] else ""])
    runs = f"Median (smallest–largest) of {work['repeats']} runs of each engine in turn, one thread"
    texts = f"{work['texts']} texts of {work['words']} words in batches of {work['batch']}, LoRA of rank {work['rank']}"
    return f"{aligned(rows)}\n\n{runs}; {texts}; {found['task']}, {found['profile']}."


def _bundle(folder: Path, trust: Path | None) -> Bundle:
    return Trust.open(folder, trust).bundle


def _run(given: Mapping[str, Any]) -> dict[str, float]:
    try:
        return in_process(__name__, given, QUIET | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
    except DataError as error:
        raise DataError(f"{given['engine']}: {error}", about=error.about) from None


def _examples(work: TrainingWorkload, labels: int) -> list[Example]:
    rng = np.random.default_rng(0)
    return [
        Example(" ".join(rng.choice(TEXT.split(), work.words)), number % max(labels, 1)) for number in range(work.texts)
    ]


def _measured(engine: str, bundle: str, trust: str | None, base: str, begun: float, **sizes: int) -> dict[str, float]:
    """The figures of this process. Raises what the engine does."""
    work, opened = TrainingWorkload(**sizes), _bundle(Path(bundle), None if trust is None else Path(trust))
    manifest, verified = opened.base_manifest(), opened.base() if engine == "onnx" else None
    targets = {name.removesuffix(LORA_A).rpartition(".")[2] for name in manifest.slots if name.endswith(LORA_A)}
    config = PeftConfig.lora(work.rank, ALPHA, tuple(sorted(targets)))
    labels = LABELS if manifest.task == "text-classification" else 0
    trainer, examples = trainer_of(verified or find_base(base), labels, config), _examples(work, labels)
    rng = np.random.default_rng(1)
    start = {spec.name: (0.02 * rng.standard_normal(spec.shape)).astype(np.float32) for spec in trainer.layout.tensors}
    task = Task(config, (), 1, work.batch, RATE, 0.0, 0.0, PARTS, PARTS)
    marks = list[tuple[float, float]]()

    def mark() -> None:
        marks.append((time.monotonic(), time.process_time()))

    trained = trainer.train(start, examples, task, epochs=1, rng=rng, control=TrainingControl(step=mark))
    mark()
    memory = resident("VmHWM")
    tokenizer = Tokenizer.from_str((opened.folder / BASE / TOKENIZER).read_text())
    tokens = sum(len(each.ids) for each in tokenizer.encode_batch([example.text for example in examples]))
    seconds, cpu = (last - first for first, last in zip(marks[0], marks[-1], strict=True))
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu,
        "first_step": marks[1][0] - begun,
        "first_step_cpu": marks[1][1],
        "memory": memory,
        "loss": trainer.score(trained, examples).loss / len(examples),
    }


if __name__ == "__main__":
    answer_once(_measured)
