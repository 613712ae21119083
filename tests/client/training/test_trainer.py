"""Training on the device: the same numbers for the same generator, a base that never moves, and loud refusals."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from aggregation.errors import DataError
from client.training import torchengine
from client.training.control import TrainingControl
from client.training.examples import Example, Score, Split
from client.training.personal import (
    OWN_STRENGTH,
    PENALTY,
    Candidate,
    Choice,
    PersonalStep,
    better_by_chance,
    personalize,
    rehearsal,
    with_both_heads,
    with_own_head,
)
from client.training.trainer import ClassifierTrainer, batches
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.manifest import PeftConfig
from edgeadapt.methods import classifier
from edgeadapt.methods.classifier import HEAD_SCALE, seeded
from edgeadapt.methods.lorasb import folded
from edgeadapt.methods.parts import PARTS, Part, is_bias, part_of
from edgeadapt.rounds.task import MAX_LOSS, OptimizerName, Task
from tests.support import refused

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = ("Light", "Music", "Timer")
TASK = Task(PeftConfig("LORA", 2, 4, ("query", "value")), LABELS, 1, 4, 0.01, 0.0, 0.0, PARTS, PARTS)
TEXTS = ("turn on the light", "play music", "set a timer", "kitchen light off", "next song", "ten minutes", "stop")
EXAMPLES = tuple(Example(text, i % 3) for i, text in enumerate(TEXTS))


@pytest.fixture(scope="module")
def trainer(tiny_base: Any) -> ClassifierTrainer:
    return torchengine.classifier(tiny_base, 3, PeftConfig.lora(2, 4))


@pytest.fixture(scope="module")
def start(trainer: ClassifierTrainer) -> Tensors:
    prototypes = trainer.embed(["turn on the light", "play music", "set a timer"])
    return seeded(trainer.engine.model, prototypes, torch.Generator().manual_seed(3))


def rng(seed: int = 7) -> np.random.Generator:
    return np.random.default_rng(seed)


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def distance(left: Tensors, right: Tensors) -> float:
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


def test_training_is_the_same_for_a_generator_whatever_was_trained_before(
    trainer: ClassifierTrainer, start: Tensors
) -> None:
    first = trainer.train(start, EXAMPLES, TASK, epochs=2, rng=rng(1))
    trainer.train(first, EXAMPLES[:3], TASK, epochs=1, rng=rng(9))
    assert same(trainer.train(start, EXAMPLES, TASK, epochs=2, rng=rng(1)), first)


def test_threads_that_share_a_trainer_get_what_each_would_get_alone(trainer: ClassifierTrainer, start: Tensors) -> None:
    def outcome(seed: int) -> tuple[Tensors, Any, Any]:
        adapter = trainer.train(start, EXAMPLES, TASK, epochs=4, rng=rng(seed))
        return adapter, trainer.logits(adapter, TEXTS), trainer.embed(TEXTS, adapter)

    alone = [outcome(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = [*pool.map(outcome, range(4))]
    for one, other in zip(alone, together, strict=True):
        assert same(one[0], other[0])
        assert np.array_equal(one[1], other[1])
        assert np.array_equal(one[2], other[2])


def test_another_generator_visits_the_examples_in_another_order(trainer: ClassifierTrainer, start: Tensors) -> None:
    results = [trainer.train(start, EXAMPLES, TASK, epochs=2, rng=rng(seed)) for seed in range(4)]
    pairs = [(i, k) for i in range(4) for k in range(i)]
    assert not [pair for pair in pairs if same(results[pair[0]], results[pair[1]])]


def test_training_moves_the_adapter_and_lowers_the_loss(trainer: ClassifierTrainer, start: Tensors) -> None:
    trained = trainer.train(start, EXAMPLES, TASK, epochs=8, rng=rng())
    assert trainer.score(trained, EXAMPLES).loss < 0.5 * trainer.score(start, EXAMPLES).loss
    assert all(not np.array_equal(trained[name], start[name]) for name in start)


def test_the_base_is_the_same_bit_for_bit_after_training(
    trainer: ClassifierTrainer, start: Tensors, tiny_base: Any
) -> None:
    adapter = {name for name, value in trainer.engine.model.named_parameters() if value.requires_grad}
    frozen = {name: value.clone() for name, value in trainer.engine.model.state_dict().items() if name not in adapter}
    file = (tiny_base.folder / "model.safetensors").read_bytes()
    trainer.train(start, EXAMPLES, TASK, epochs=3, rng=rng())
    moved = [name for name, value in frozen.items() if not torch.equal(trainer.engine.model.state_dict()[name], value)]
    assert frozen
    assert not moved
    assert (tiny_base.folder / "model.safetensors").read_bytes() == file


def test_the_start_is_not_changed_in_place(trainer: ClassifierTrainer, start: Tensors) -> None:
    before = {name: value.copy() for name, value in start.items()}
    trainer.train(start, EXAMPLES, TASK, epochs=2, rng=rng())
    assert same(start, before)


def test_training_draws_nothing_from_a_global_generator(trainer: ClassifierTrainer, start: Tensors) -> None:
    before = torch.get_rng_state()
    trainer.train(start, EXAMPLES, TASK, epochs=1, rng=rng())
    assert torch.equal(torch.get_rng_state(), before)


def test_no_examples_are_refused(trainer: ClassifierTrainer, start: Tensors) -> None:
    with refused(DataError, "examples"):
        trainer.train(start, (), TASK, epochs=1, rng=rng())


def test_a_loss_that_is_not_finite_is_refused(trainer: ClassifierTrainer, start: Tensors) -> None:
    broken = {name: np.full_like(value, 3e38) for name, value in start.items()}
    with refused(DataError, "training.loss"):
        trainer.train(broken, EXAMPLES, TASK, epochs=1, rng=rng())


def test_a_phrase_scores_the_same_alone_and_in_a_batch_with_a_longer_one(
    trainer: ClassifierTrainer, start: Tensors
) -> None:
    trained = trainer.train(start, EXAMPLES, TASK, epochs=3, rng=rng())
    together = trainer.logits(trained, [*TEXTS, "play a song in the kitchen and set a timer"])
    alone = np.concatenate([trainer.logits(trained, [text]) for text in TEXTS])
    assert np.abs(together[:-1] - alone).max() < 1e-5
    assert np.abs(trainer.logits(trained, TEXTS[::-1])[::-1] - alone).max() < 1e-5


def test_a_score_is_the_sum_over_batches_of_any_size(
    trainer: ClassifierTrainer, start: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer.score(start, EXAMPLES)
    monkeypatch.setattr("edgeadapt.methods.classifier.BATCH", 2)
    split = trainer.score(start, EXAMPLES)
    assert (split.correct, split.count) == (whole.correct, whole.count)
    assert split.loss == pytest.approx(whole.loss, rel=1e-5)


def test_a_loss_is_clipped_to_its_bound(trainer: ClassifierTrainer, start: Tensors) -> None:
    sure = {name: value * (1e4 if "classifier" in name else 1) for name, value in start.items()}
    wrong = [Example(text, (int(np.argmax(trainer.logits(sure, [text]))) + 1) % 3) for text in TEXTS]
    score = trainer.score(sure, wrong)
    assert score == Score(0, len(TEXTS), MAX_LOSS * len(TEXTS))


def test_a_text_longer_than_the_base_can_read_is_truncated(trainer: ClassifierTrainer, start: Tensors) -> None:
    positions = trainer.engine.model.get_base_model().encoder.config.max_position_embeddings
    long = " ".join(["light"] * 3 * positions)
    assert trainer.logits(start, [long, "light"]).shape == (2, 3)
    trainer.train(start, [Example(long, 0)], TASK, epochs=1, rng=rng())


def test_texts_of_similar_length_share_a_batch_and_each_is_visited_once_in_an_epoch() -> None:
    lengths = [3, 9, 3, 9, 5, 3, 9]
    found = list(batches(lengths, 3, 2, np.random.default_rng(1)))
    assert [sorted(i for batch in found[k : k + 3] for i in batch) for k in (0, 3)] == [list(range(7))] * 2
    assert sorted(sorted(lengths[i] for i in batch) for batch in found[:3]) == [[3, 3, 3], [5, 9, 9], [9]]


# The seeded adapter.


def test_the_seeded_adapter_changes_nothing_but_adds_the_prototype_head(
    trainer: ClassifierTrainer, start: Tensors
) -> None:
    classifier.load(trainer.engine.model, start)
    texts = ["turn on the light", "play music", "set a timer", "stop the timer"]
    plain, through = trainer.embed(texts), trainer.logits(start, texts)
    assert np.abs(through - HEAD_SCALE * plain @ plain[:3].T).max() < 1e-4
    assert through[:3].argmax(1).tolist() == [0, 1, 2]
    assert np.allclose(np.diag(through[:3]), HEAD_SCALE, atol=1e-4)


def test_embeddings_are_those_that_the_head_reads_with_or_without_the_adapter(
    trainer: ClassifierTrainer, start: Tensors
) -> None:
    rng = np.random.default_rng(0)
    moved = {name: value + rng.normal(0, 0.1, value.shape).astype(np.float32) for name, value in start.items()}
    head = {name.rsplit(".", 1)[1]: value for name, value in moved.items() if ".classifier." in name}
    many = TEXTS * 20  # more than a batch
    found = trainer.embed(many, moved)
    assert np.allclose(found @ head["weight"].T + head["bias"], trainer.logits(moved, many), atol=1e-4)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert np.abs(found - trainer.embed(many)).max() > 1e-3
    assert np.array_equal(trainer.embed(many, start), trainer.embed(many))  # B is zero
    assert trainer.embed([]).shape == trainer.embed([], moved).shape == (0, found.shape[1])


def test_without_an_adapter_the_base_has_its_own_biases(tiny_base: Any) -> None:
    trained = torchengine.classifier(tiny_base, 3, PeftConfig("LORA", 2, 4, ("query",), bias="all"))
    before = trained.embed(TEXTS)
    start = seeded(trained.engine.model, np.eye(3, 32, dtype=np.float32), torch.Generator().manual_seed(3))
    assert not any("classifier" in name for name in start if is_bias(name))
    moved = {name: value + 1 if is_bias(name) else value for name, value in start.items()}
    assert np.abs(trained.embed(TEXTS, moved) - before).max() > 1e-3
    assert np.array_equal(trained.embed(TEXTS), before)


def test_the_seeded_adapter_is_drawn_from_the_generator_alone(trainer: ClassifierTrainer, start: Tensors) -> None:
    prototypes = np.eye(3, 32, dtype=np.float32)
    draws = [seeded(trainer.engine.model, prototypes, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert same(draws[0], draws[1])
    assert not same(draws[0], draws[2])
    assert {name for name in start if not np.array_equal(draws[0][name], draws[2][name])} == {
        name for name in start if ".lora_A." in name
    }


def test_a_label_without_a_public_phrase_starts_with_an_even_head(trainer: ClassifierTrainer) -> None:
    prototypes = np.eye(3, 32, dtype=np.float32)
    prototypes[1] = 0
    drawn = seeded(trainer.engine.model, prototypes, torch.Generator().manual_seed(1))
    Layout.of(drawn).check(drawn)
    assert (trainer.logits(drawn, TEXTS)[:, 1] == 0).all()


# The private adapter.

STEP = PersonalStep(0, HEAD_SCALE, choice=Choice.BEST)
MINE = tuple(replace(e, split=Split.VALIDATION if i % 3 == 0 else Split.TRAIN) for i, e in enumerate(EXAMPLES * 2))


def test_a_device_keeps_the_best_candidate_on_its_held_out_examples(trainer: ClassifierTrainer, start: Tensors) -> None:
    worse = {name: -value for name, value in start.items()}
    held_out = [e for e in MINE if e.split is Split.VALIDATION]
    kept = personalize(trainer, {Candidate.BASE: start, Candidate.GLOBAL: worse}, MINE, TASK, STEP, rng=rng())
    assert set(kept.scores) == {Candidate.BASE, Candidate.GLOBAL}
    best = max(kept.scores.values(), key=lambda score: (score.correct, -score.loss))
    assert kept.scores[kept.chosen] == best == trainer.score(kept.adapter, held_out)


def test_a_device_fine_tunes_the_global_adapter_on_its_training_examples(
    trainer: ClassifierTrainer, start: Tensors
) -> None:
    shared = trainer.train(start, EXAMPLES, TASK, epochs=1, rng=rng())
    how = replace(STEP, epochs=3)
    kept = personalize(trainer, {Candidate.BASE: start, Candidate.GLOBAL: shared}, MINE, TASK, how, rng=rng())
    mine = trainer.train(shared, [e for e in MINE if e.split is Split.TRAIN], TASK, epochs=3, rng=rng())
    held_out = [e for e in MINE if e.split is Split.VALIDATION]
    assert kept.scores[Candidate.PERSONAL] == trainer.score(mine, held_out)
    if kept.chosen is Candidate.PERSONAL:
        assert same(kept.adapter, mine)


def test_without_held_out_examples_a_device_keeps_the_personal_adapter(
    trainer: ClassifierTrainer, start: Tensors
) -> None:
    only = [e for e in MINE if e.split is Split.TRAIN]
    how = replace(STEP, epochs=1)
    kept = personalize(trainer, {Candidate.BASE: start, Candidate.GLOBAL: start}, only, TASK, how, rng=rng())
    assert kept.chosen is Candidate.PERSONAL
    assert distance(kept.adapter, start) > 0


@pytest.mark.parametrize("method", ["fine-tune", "ridge", "ensemble", "interpolate"])
def test_each_method_makes_its_personal_adapter_from_the_global_one(
    trainer: ClassifierTrainer, start: Tensors, method: str
) -> None:
    shared = trainer.train(start, EXAMPLES[:4], TASK, epochs=1, rng=rng())
    own = [e for e in MINE if e.split is Split.TRAIN]
    how = PersonalStep(2, HEAD_SCALE, method, share=0.25, choice=Choice.NEVER)
    kept = personalize(trainer, {Candidate.BASE: start, Candidate.GLOBAL: shared}, MINE, TASK, how, rng=rng())
    tuned = trainer.train(shared, own, TASK, epochs=2, rng=rng())
    expected = {
        "fine-tune": tuned,
        "ridge": with_own_head(trainer, shared, MINE, scale=HEAD_SCALE),
        "ensemble": with_both_heads(trainer, tuned, shared, MINE, scale=HEAD_SCALE),
        "interpolate": {name: 0.75 * shared[name] + 0.25 * tuned[name] for name in shared},
    }
    assert kept.chosen is Candidate.PERSONAL
    assert distance(kept.judged, expected[method]) < 1e-6
    assert all(distance(kept.judged, other) > 1e-3 for name, other in expected.items() if name is not method)
    assert all(tensor.dtype == np.float32 for tensor in kept.adapter.values())
    if method != "ridge":
        assert kept.adapter is kept.judged
        return
    every = [replace(example, split=Split.TRAIN) for example in MINE]
    assert same(kept.adapter, with_own_head(trainer, shared, every, scale=HEAD_SCALE))
    assert distance(kept.adapter, kept.judged) > 1e-3
    held_out = [example for example in MINE if example.split is Split.VALIDATION]
    assert kept.scores[Candidate.PERSONAL] == trainer.score(kept.judged, held_out)


def test_a_logistic_head_is_the_one_near_the_shared_one_with_the_least_loss_on_the_adapted_embedding(
    trainer: ClassifierTrainer, start: Tensors
) -> None:
    shared = trainer.train(start, EXAMPLES[:4], TASK, epochs=1, rng=rng())
    how = PersonalStep(0, HEAD_SCALE, "logistic", choice=Choice.NEVER)
    kept = personalize(trainer, {Candidate.BASE: start, Candidate.GLOBAL: shared}, MINE, TASK, how, rng=rng())
    for adapter, splits in ((kept.judged, {Split.TRAIN}), (kept.adapter, {Split.TRAIN, Split.VALIDATION})):
        own = [example for example in MINE if example.split in splits]
        changed = {name for name in shared if not np.array_equal(adapter[name], shared[name])}
        weight, bias = sorted(changed, key=len, reverse=True)
        assert weight.endswith("classifier.weight")
        assert bias.endswith("classifier.bias")
        head = [torch.from_numpy(adapter[name]).requires_grad_() for name in (weight, bias)]
        logits = torch.from_numpy(trainer.embed([e.text for e in own], shared)) @ head[0].T + head[1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([e.label for e in own]), reduction="sum")
        before = [torch.from_numpy(shared[name]) for name in (weight, bias)]
        loss = loss + PENALTY / 2 * sum((part - old).square().sum() for part, old in zip(head, before, strict=True))
        assert all(gradient.abs().max() < 5e-3 for gradient in torch.autograd.grad(loss, head))


@pytest.mark.parametrize(("held_out", "chosen"), [(4, Candidate.PERSONAL), (5, Candidate.BASE)])
def test_another_candidate_is_kept_only_if_it_is_better_by_more_than_chance(
    trainer: ClassifierTrainer, start: Tensors, held_out: int, chosen: Candidate
) -> None:
    """Five examples that one adapter alone answers right are beyond chance at 5 %, four are not."""
    texts = [e.text for e in EXAMPLES if trainer.score(start, [e]).correct][:1]
    label = next(e.label for e in EXAMPLES if e.text == texts[0])
    mine = [Example(texts[0], label, Split.VALIDATION)] * held_out
    bad = {name: -value for name, value in start.items()}
    how = replace(STEP, choice=Choice.SIGNIFICANT)
    kept = personalize(trainer, {Candidate.BASE: start, Candidate.PERSONAL: bad}, mine, TASK, how, rng=rng())
    assert kept.chosen is chosen
    kept = personalize(trainer, {Candidate.BASE: start, Candidate.PERSONAL: bad}, mine, TASK, STEP, rng=rng())
    assert kept.chosen is Candidate.BASE


def test_the_sign_test_counts_the_examples_on_which_two_adapters_differ() -> None:
    one, other = np.array([1, 1, 1, 0, 1, 0], bool), np.array([0, 0, 1, 0, 0, 1], bool)
    assert better_by_chance(one, other) == pytest.approx((4 + 1) / 16)  # at least 3 of 4 heads
    assert better_by_chance(other, one) == pytest.approx(15 / 16)
    assert better_by_chance(one, one) == 1


# Denormal numbers, which take a processor up to a hundred times as long.

MANY_THREADS = """
import os, sys
from contextlib import nullcontext
import torch
from edgeadapt.bases.base import find_base
from edgeadapt.formats.peftconfig import PeftConfig
from client.training import torchengine
child = os.fork()  # before torch has threads, which keep what holds when they start
if not child:
    torchengine.flushed_denormals = nullcontext
torch.set_num_threads(2)
torchengine.classifier(find_base(sys.argv[1]), 3, PeftConfig.lora(2, 4))
with torchengine.flushed_denormals():
    products = torch.full((2**20,), 1e-30) * 1e-9
if child:
    os.waitpid(child, 0)
print(int(products.view(torch.int32).count_nonzero()), flush=True)
"""


def test_every_thread_of_torch_flushes_denormal_numbers_and_would_not_without_a_word(tiny_base: Any) -> None:
    command = [sys.executable, "-c", MANY_THREADS, str(tiny_base.folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [int(line) for line in found.stdout.split()] == [2**20, 0]  # the child's, and then the parent's


def test_training_and_scoring_flush_denormal_numbers_and_nothing_else_does(
    trainer: ClassifierTrainer, start: Tensors
) -> None:
    """Also after a score within a training."""
    products = list[float]()

    def watch(*_: Any) -> None:
        products.append(float(torch.tensor(1e-30) * 1e-9))

    control = TrainingControl(patience=2, held_out=lambda adapter: trainer.score(adapter, EXAMPLES).loss)
    hook = trainer.engine.model.register_forward_pre_hook(watch)
    trainer.train(start, EXAMPLES, TASK, epochs=2, rng=rng(), control=control)
    hook.remove()
    assert (len(products), set(products)) == (6, {0.0})
    assert float(torch.tensor(1e-30) * 1e-9) > 0


# Parts, and the proximal term.


@pytest.mark.parametrize("parts", [(Part.B, Part.HEAD), (Part.A,), (Part.HEAD,)])
def test_only_the_parts_of_the_task_are_trained(
    trainer: ClassifierTrainer, start: Tensors, parts: tuple[Part, ...]
) -> None:
    begin = trainer.train(start, EXAMPLES, TASK, epochs=2, rng=rng())  # B = 0 on day one, so that A has no gradient
    trained = trainer.train(begin, EXAMPLES, replace(TASK, trained=parts), epochs=2, rng=rng())
    moved = {name for name in begin if not np.array_equal(trained[name], begin[name])}
    assert moved == {name for name in begin if part_of(name) in parts}
    # And the next one trains all again.
    assert distance(trainer.train(start, EXAMPLES, TASK, epochs=2, rng=rng()), begin) == 0


def test_an_adapter_without_the_parts_of_the_task_is_refused(trainer: ClassifierTrainer, start: Tensors) -> None:
    with refused(DataError, "task.trained"):
        trainer.train(start, EXAMPLES, replace(TASK, trained=(Part.VECTORS,)), epochs=1, rng=rng())


def test_the_proximal_term_is_half_of_the_squared_distance(trainer: ClassifierTrainer, start: Tensors) -> None:
    """One step from a start that is no anchor yet has no gradient of it; so two steps by hand."""
    task, batch = replace(TASK, proximal=0.7, batch_size=len(EXAMPLES)), EXAMPLES
    trained = trainer.train(start, batch, task, epochs=2, rng=rng())
    classifier.load(trainer.engine.model, start)
    model = trainer.engine.model
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    anchors = {name: value.detach().clone() for name, value in named.items()}
    optimizer = torch.optim.AdamW(list(named.values()), lr=task.learning_rate, weight_decay=0.0)
    labels = torch.tensor([example.label for example in batch])
    for _ in range(2):
        ids, mask = classifier.padded([torch.tensor(ids) for ids in trainer.tokens([one.text for one in batch])])
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids, attention_mask=mask), labels)
        loss = loss + 0.35 * sum(((named[name] - anchors[name]) ** 2).sum() for name in named)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert distance(classifier.tensors(model), trained) < 1e-5


# The personal head.


def test_the_personal_head_fits_the_devices_examples_and_stays_near_the_one_before(
    trainer: ClassifierTrainer, start: Tensors
) -> None:
    examples = (*EXAMPLES, Example("a phrase that is held out", 0, Split.VALIDATION))
    found = with_own_head(trainer, start, examples, scale=HEAD_SCALE)
    (name,) = (name for name in start if not np.array_equal(found[name], start[name]))
    assert name.endswith("classifier.weight")
    before, after = (trainer.score(adapter, EXAMPLES) for adapter in (start, found))
    assert after.correct > before.correct
    assert after.loss < before.loss
    x = trainer.embed([e.text for e in EXAMPLES], start).astype(np.float64)
    left, y = x.T @ x + OWN_STRENGTH * np.eye(x.shape[1]), np.eye(3)[[e.label for e in EXAMPLES]]
    expected = np.linalg.solve(left, x.T @ y + OWN_STRENGTH * start[name].T / HEAD_SCALE)
    assert np.allclose(found[name].T / HEAD_SCALE, expected, atol=1e-5)


def test_without_examples_of_its_own_a_device_keeps_the_head(trainer: ClassifierTrainer, start: Tensors) -> None:
    held_out = [Example("stop", 0, Split.VALIDATION)]
    found = with_own_head(trainer, start, held_out, scale=HEAD_SCALE)
    assert all(np.allclose(found[name], start[name], atol=1e-5) for name in start)


def test_an_ensemble_of_two_heads_is_one_adapter_whose_logits_are_their_sum(
    trainer: ClassifierTrainer, start: Tensors
) -> None:
    tuned = trainer.train(start, EXAMPLES, TASK, epochs=2, rng=rng())
    heads = {name for name in start if ".classifier." in name}
    shared = start | {name: start[name] + np.float32(0.25) for name in heads}
    found = with_both_heads(trainer, tuned, shared, EXAMPLES, scale=HEAD_SCALE)
    own = with_own_head(trainer, tuned | {name: shared[name] for name in heads}, EXAMPLES, scale=HEAD_SCALE)
    expected = trainer.logits(tuned, TEXTS) + trainer.logits(own, TEXTS)
    assert np.allclose(trainer.logits(found, TEXTS), expected, atol=1e-3)
    assert {name for name in tuned if not np.array_equal(found[name], tuned[name])} == heads


def test_a_square_between_the_factors_is_trained_alone_and_answers_like_the_folded_adapter(
    trainer: ClassifierTrainer, start: Tensors
) -> None:
    task = replace(TASK, trained=(Part.R,), shared=(Part.R,))
    trained = trainer.train(start, EXAMPLES, task, epochs=20, rng=rng())
    assert {name for name in trained if name not in start} == {name for name in trained if part_of(name) is Part.R}
    assert all(np.array_equal(trained[name], start[name]) for name in start)
    assert trainer.score(folded(trained), EXAMPLES).loss < 0.9 * trainer.score(start, EXAMPLES).loss
    step = replace(task, optimizer=OptimizerName.SGD, learning_rate=1.0, batch_size=len(EXAMPLES))
    moved = trainer.train(start, EXAMPLES, step, epochs=1, rng=rng())
    length = np.sqrt(sum(float((moved[name] ** 2).sum()) for name in moved.keys() - start.keys()))

    def loss(share: float) -> float:
        scaled = {name: np.float32(share) * value for name, value in moved.items() if name not in start}
        return trainer.score(folded(start | scaled), EXAMPLES).loss / len(EXAMPLES)

    share = 0.05 / length  # of the gradient, along which the loss falls by the square of its length
    assert (loss(-share) - loss(share)) / (2 * share) == pytest.approx(length**2, rel=0.02)


# What a device rehearses when it makes its personal adapter, and that it keeps none that forgets public examples.
ENGLISH, GERMAN = "turn on the kitchen lights", "mach das licht in der küche an"
PUBLIC = tuple(
    Example(f"{text} {number}", label) for number in range(3) for label in range(2) for text in (ENGLISH, GERMAN)
)


@pytest.mark.parametrize(("own", "first", "other"), [(GERMAN, "mach", "turn"), (ENGLISH, "turn", "mach")])
def test_a_device_rehearses_public_examples_in_its_own_words_and_counts_others_in_other_words_too(
    trainer: ClassifierTrainer, own: str, first: str, other: str
) -> None:
    found = rehearsal(trainer, [Example(own, 0)], PUBLIC, 2)
    assert [example.label for example in found.trained] == [0, 0, 1, 1]
    assert all(example.text.startswith(first) for example in found.trained)
    assert [(example.text.split()[0], example.label) for example in found.counted] == [
        (first, 0),
        (first, 1),
        (other, 0),
        (other, 1),
    ]
    assert not {*found.trained} & {*found.counted}


def test_few_public_examples_are_rehearsed_none_is_counted_twice_and_those_of_the_device_are_neither(
    trainer: ClassifierTrainer,
) -> None:
    three = [Example(text, 1) for text in ("stop", "next song", "play music")]
    assert [len(found) for found in counted(trainer, three, 2)] == [2, 1]
    assert [len(found) for found in counted(trainer, three, 9)] == [3, 0]
    assert [len(found) for found in counted(trainer, three, 0)] == [0, 0]
    assert [len(found) for found in counted(trainer, three, 2, own="  STOP")] == [2, 0]


def counted(trainer: ClassifierTrainer, public: list[Example], each: int, own: str = "lights") -> tuple[Any, Any]:
    """What is rehearsed and what is counted."""
    found = rehearsal(trainer, [Example(own, 0, Split.VALIDATION)], public, each)
    return found.trained, found.counted


def test_rehearsal_keeps_what_a_device_never_says(trainer: ClassifierTrainer, start: Tensors) -> None:
    """The personal adapter forgets a label without an example, unless it rehearses public ones of it."""
    begin = trainer.train(start, EXAMPLES, TASK, epochs=12, rng=rng())
    lost = [example for example in EXAMPLES if example.label == 2]
    own, public = [example for example in EXAMPLES if example.label != 2], [Example("set timers", 2)]
    forgot, kept = (
        trainer.train(begin, [*own, *rehearsal(trainer, own, public, each).trained], TASK, epochs=12, rng=rng())
        for each in (0, 1)
    )
    assert trainer.score(kept, lost).loss < 0.5 * trainer.score(forgot, lost).loss


@pytest.mark.parametrize("method", ["fine-tune", "ridge"])
def test_a_personal_adapter_that_forgets_public_examples_is_moved_back_or_not_kept(
    trainer: ClassifierTrainer, start: Tensors, method: str
) -> None:
    """The device's examples give the public ones other labels, so that a personal adapter cannot do both."""
    shared = trainer.train(start, EXAMPLES, TASK, epochs=40, rng=rng())
    plain = [example for example in EXAMPLES if trainer.score(shared, [example]).correct]
    others = [replace(example, label=(example.label + 1) % 3) for example in plain]
    both, how = {Candidate.GLOBAL: shared}, PersonalStep(40, 64.0, method, choice=Choice.NEVER)
    forgot = personalize(trainer, both, others, TASK, how, rng=rng())
    kept = personalize(trainer, both, others, TASK, how, rng=rng(), plain=plain)
    assert trainer.score(forgot.adapter, plain).correct < len(plain) == trainer.score(kept.adapter, plain).correct
    assert distance(kept.adapter, shared) < distance(forgot.adapter, shared)


def test_a_personal_adapter_that_forgets_in_each_quarter_of_the_way_is_no_candidate(
    trainer: ClassifierTrainer, start: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, score = list[Tensors](), trainer.score

    def scored(adapter: Tensors, examples: Any) -> Score:
        if examples is not plain:
            return score(adapter, examples)
        asked.append(adapter)
        return Score(int(adapter is start), 1, 0.0)

    monkeypatch.setattr(trainer, "score", scored)
    plain, both = [EXAMPLES[0]], {Candidate.GLOBAL: start}
    kept = personalize(trainer, both, MINE, TASK, replace(STEP, epochs=1), rng=rng(), plain=plain)
    assert (kept.chosen, set(kept.scores)) == (Candidate.GLOBAL, {Candidate.GLOBAL})
    steps = [distance(adapter, start) / distance(asked[1], start) for adapter in asked]
    assert steps == pytest.approx([0, 1, 0.75, 0.5, 0.25], abs=1e-3)
