"""Noise of a device in JavaScript under Node: the same numbers from the same bits, the same account, the same limit."""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aggregation import ring
from aggregation.errors import ConfigError, ProtocolError
from aggregation.messages import Offer, Plan
from aggregation.policy import Policy
from aggregation.privacy.accounting import Mechanism
from aggregation.privacy.noise import MAX_DEVIATION, Table, draw, table
from aggregation.spec import COUNTS, Grouping, Privacy, SessionSpec
from aggregation.vector import Segment, VectorSpec
from client.node import privacyledger, sumhistory
from client.node.privacyledger import PrivacyLedger
from client.node.privateparts import PrivateParts, check_unshared, ever_private, private_on
from client.node.sumhistory import SumHistory, sketch
from client.training.private import private_of, subject_of, with_private
from edgeadapt.formats import files
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.methods.parts import PARTS, Part, part_of
from edgeadapt.rounds import analytic
from edgeadapt.rounds.sums import Bounds, noisy_spec, noisy_vector
from edgeadapt.rounds.task import Task
from tests.aggregation.privacy.test_noise import fits
from tests.browser.conftest import CONFIG
from tests.browser.test_aggregation import Drawn, node, offer_of, run
from tests.client.node.test_adapterstate import LEAST, MOMENTS, SERIALS, SPEC, TASK, WITHOUT_ONE, adapter, moved
from tests.support.fleet import ADAPTER, BASE, session_spec

__all__ = ["node"]  # fixtures


raw = bytes.fromhex
VARIANCES = (0.25, 0.7, 9.0, 1000.0 / 3, float(MAX_DEVIATION**2))


def drawn(mechanism: Mechanism, variance: float, key: bytes) -> dict[str, Any]:
    """A table, and more draws than are read at a time."""
    found, size = table(mechanism, variance), 40_000
    noise = draw(mechanism, variance, size, key)
    return {
        "mechanism": mechanism.value,
        "variance": variance,
        "key": key.hex(),
        "size": size,
        "first": found.first,
        "bounds": files.sha256(found.low.tobytes()),  # the least of their words: no other one can differ alone
        "drawn": files.sha256(noise.astype(np.int32).tobytes()),
    }


class Given:
    """Fixed bytes in place of a keystream."""

    def __init__(self, given: bytes) -> None:
        self.left = given

    def read_into(self, buffer: memoryview) -> None:
        buffer[:], self.left = self.left[: len(buffer)], self.left[len(buffer) :]


def tied() -> dict[str, Any]:
    """Draws at the boundaries of a table, of which some have equal first words."""
    weights = [1 << 190, 1, 1 << 126, 3 << 70, 1, 1 << 60]
    found = Table.of(weights)
    begins = np.unique(np.concatenate([found.high, found.high - np.uint64(1), found.high + np.uint64(1)]))
    ties = [word for word in begins if word in found.high]
    assert len(set(found.high.tolist())) < len(found.high)
    following = np.concatenate([found.low, found.low - np.uint64(1)])
    first = np.concatenate([np.tile(begins, 4), np.repeat(ties, len(following))])
    at_ties = [word for word in first if word in found.high]
    nexts = np.resize(following, len(at_ties))
    given = first.tobytes() + nexts.tobytes()
    source = Given(given)
    outcomes = found.draw(source, len(first))  # type: ignore[arg-type]
    assert not source.left
    return {"weights": [str(weight) for weight in weights], "words": given.hex(), "drawn": outcomes.tolist()}


def noisy_session(size: int, bits: int, noise: float = 0.4, name: str = "delta", **changes: Any) -> SessionSpec:
    vector = noisy_spec(name, size, Bounds(clip_norm=2.0, noise=noise, ring_bits=bits, max_clients=8, weight_cap=1))
    least = session_spec(8).minimum_survivors
    given = {"vector": vector, "clip_norm": 2.0, "weight_cap": 1, "privacy": Privacy(Mechanism.SKELLAM, least, 1e-6)}
    return session_spec(8, **(given | changes))


def contributed(rng: np.random.Generator, size: int, bits: int, mechanism: Mechanism) -> dict[str, Any]:
    spec = noisy_session(size, bits, privacy=Privacy(mechanism, 5, 1e-6))
    vector = rng.normal(size=size)
    vector *= 1.9 / np.linalg.norm(vector)
    coins, key = rng.bytes(8 * size), rng.bytes(32)
    found = noisy_vector(vector, spec, raw(ADAPTER), Drawn(coins), key)  # type: ignore[arg-type]
    return {
        "offer": offer_of(spec),
        "vector": vector.tobytes().hex(),
        "adapter": ADAPTER,
        "drawn": (coins + key).hex(),
        "packed": ring.pack(found, bits).hex(),
    }


def corrections(rng: np.random.Generator, d: int = 6, k: int = 3) -> dict[str, Any]:
    head = {
        "classifier.weight": 9 * rng.normal(size=(k, d)).astype(np.float32),
        "classifier.bias": rng.normal(size=k).astype(np.float32),
    }
    head["classifier.weight"][1] = 0
    spec = noisy_session(d * k, 32, name=analytic.CORRECTIONS)
    embeddings, labels = rng.normal(size=(9, d)), rng.integers(0, k, 9)
    embeddings[3] = 0
    return {
        "offer": offer_of(spec),
        "embeddings": embeddings.tobytes().hex(),
        "labels": labels.tolist(),
        **{"d": d, "k": k},
        **{name: tensor.astype(np.float64).tobytes().hex() for name, tensor in head.items()},
        "vector": analytic.contributed(embeddings, labels, head).tobytes().hex(),
    }


def specs(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Offers with noise of any size, which are sound or not."""
    sound = noisy_session(1000, 32)
    (segment,) = sound.vector.segments
    for _ in range(count):
        mechanism = rng.choice(tuple(Mechanism))
        honest = rng.choice((0, 1, 4, sound.minimum_survivors, sound.minimum_survivors + 1))
        changed = replace(segment, size=rng.choice((1, 1000, 85_000)), noise=4.0 ** rng.randint(-8, 6))
        sizes = (changed,) if rng.randrange(9) else (changed, replace(changed, name="more"))
        parts = {"segments": sizes, "ring_bits": rng.choice((12, 16, 24, 32)), "max_clients": 8}
        values = {
            "vector": parts,
            "weight_cap": rng.choice((1, 1, 1, 1, 7)),
            "privacy": {"mechanism": mechanism, "honest": honest, "delta": 10.0 ** rng.randint(-9, -2)},
            "grouping": rng.choice((None, None, None, Grouping(2, 4))),
        }
        yield judged(encoded(sound, values))


def encoded(sound: SessionSpec, values: dict[str, Any]) -> bytes:
    """The body of an offer, whether or not its spec is one."""
    vector, privacy = (made_of(type(getattr(sound, name)), values[name]) for name in ("vector", "privacy"))
    spec = made_of(SessionSpec, {name: getattr(sound, name) for name in SessionSpec.__slots__} | values)
    for name, value in (("vector", vector), ("privacy", privacy)):
        object.__setattr__(spec, name, value)
    return Offer(bytes(32), spec, ()).encode()


def made_of(kind: Any, values: dict[str, Any]) -> Any:
    """A value that nothing has checked."""
    found = object.__new__(kind)
    for name, value in values.items():
        object.__setattr__(found, name, value)
    return found


def judged(offer: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"offer": offer.hex(), "about": None, "corrupt": 1}
    try:
        spec = Offer.decode(offer).spec
    except ProtocolError as error:
        return found | {"about": error.about}
    assert spec.privacy
    try:
        epsilon = spec.spent(spec.minimum_survivors, 1).epsilon(spec.privacy.delta)
    except ConfigError:  # none is honest then
        found["corrupt"], epsilon = 0, spec.spent(spec.minimum_survivors).epsilon(spec.privacy.delta)
    return found | {"step": spec.vector.step(spec.vector.segments[0]), "epsilon": finite(epsilon)}


def finite(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None


def policies() -> Iterator[dict[str, Any]]:
    """What an owner demands of noise, and whether a session has it."""
    exact = session_spec(8, vector=VectorSpec((Segment(COUNTS, 4, 32.0),), 24, 8))
    counted = (noisy_session(4, 24, noise, name=COUNTS) for noise in (0.2, 0.9, 1.3))
    for spec in (noisy_session(100, 24), session_spec(8), exact, *counted):
        multiplier = spec.noise_multiplier(1)
        for limits in (
            {},
            {"minimum_noise_multiplier": multiplier * (1 - 1e-9)},
            {"minimum_noise_multiplier": multiplier + 1e-9},
            {"minimum_evaluation_noise": max(multiplier, 0.1) * (1 - 1e-9)},
            {"minimum_evaluation_noise": multiplier + 1e-9},
            {"maximum_epsilon": 1.0},
        ):
            given = {"known_bases": [BASE], "minimum_cohort": 8} | limits
            found: dict[str, Any] = {"offer": offer_of(spec), "policy": given, "cohort": 8, "about": None}
            try:
                Policy(**given | {"known_bases": frozenset({BASE})}).check(spec, 8)
            except ProtocolError as error:
                found["about"] = error.about
            yield found


def ledgers(rng: random.Random) -> dict[str, Any]:
    """Rounds with and without noise, until the owner's limit is reached, and what a native device's account says."""
    limits = {"maximum_epsilon": rng.choice((0.0, 4.0, 9.0)), "delta": rng.choice((1e-6, 1e-4))}
    policy, known, events = Policy(**limits), PrivacyLedger(), []
    for _ in range(14):
        spec = rng.choice((noisy_session(100, 24, noise=rng.choice((0.7, 2.0))), session_spec(8)))
        event: dict[str, Any] = {
            "offer": offer_of(spec),
            "cohort": 8,
            "survivors": rng.choice((0, 0, 7, 8)),
            "refused": None,
        }
        try:
            if event["survivors"]:
                known = privacyledger.on_survivors(known, spec, 8, event["survivors"], policy)
            else:
                known = privacyledger.on_plan(known, spec, 8, policy)
        except ProtocolError as error:
            event["refused"] = error.about
        event |= {"epsilon": finite(known.spent.epsilon(policy.delta)), "noisy": known.noisy, "bare": known.bare}
        events.append(event)
    return {"policy": limits, "events": events}


def test_noise_and_its_account_are_those_of_a_native_device(tmp_path: Path, node: str) -> None:
    """And the noise that a device in JavaScript draws for itself has the scale that is accounted for, and no other."""
    rng, rnd = np.random.default_rng(8), random.Random(8)  # noqa: S311  # not a secret
    made, own = tmp_path / "made.json", tmp_path / "own.bin"
    spec = noisy_session(200_000, 32)
    content = {
        "draws": [drawn(mechanism, variance, rng.bytes(32)) for mechanism in Mechanism for variance in VARIANCES],
        "ties": tied(),
        "contributions": [
            contributed(rng, size, bits, mechanism)
            for mechanism in Mechanism
            for size, bits in ((1, 24), (7, 22), (1000, 16), (40_000, 32))
        ],
        "corrections": corrections(rng),
        "own": {"offer": offer_of(spec), "adapter": ADAPTER},
        "specs": list(specs(rnd, 300)),
        "policies": list(policies()),
        "ledgers": [ledgers(rnd) for _ in range(40)],
    }
    assert len({one["about"] for one in content["specs"]}) > 4
    assert {one["about"] for one in content["policies"]} == {None, "offer.privacy", "offer.noise_multiplier"}
    refused = [event["refused"] for one in content["ledgers"] for event in one["events"]]
    assert set(refused) == {None, "plan.epsilon"}
    made.write_text(json.dumps(content))
    run(node, "noise.test.mjs", EDGEADAPT_NOISE=made, EDGEADAPT_OWN=own)
    (segment,) = spec.vector.segments
    noise = np.frombuffer(own.read_bytes(), np.int32).astype(np.int64)
    variance = (segment.noise / spec.vector.step(segment)) ** 2
    assert noise.size == segment.size
    assert fits(noise, Mechanism.SKELLAM, variance)
    assert not fits(noise, Mechanism.SKELLAM, variance * 4 / 9)
    assert not fits(noise, Mechanism.SKELLAM, variance * 9 / 4)


# What a tab keeps to itself: parts that it does not share, and sums without noise; under Node, as a native device.
NAMES = ("classifier.weight", "q.lora_A.weight", "q.lora_B.weight", "q.lora_magnitude_vector")
BASE_DIGEST = "b" * 64
PLAIN = Task(CONFIG, ("off", "on"), 1, 16, 0.01, 0.0, 0.0, PARTS, PARTS)
WALKS, ROUNDS = 40, 12


def tensors(rng: random.Random) -> Tensors:
    return {name: np.full(1, rng.randrange(1000), np.float32) for name in NAMES}


def plain(tensors: Tensors) -> dict[str, float]:
    return {name: float(value[0]) for name, value in tensors.items()}


def drawn_task(rng: random.Random, lone: Part) -> Task:
    """A task, of other labels at times. Most tasks of a walk keep one part to the devices."""
    labels = rng.choice((("off", "on"), ("off", "on"), ("on", "off")))
    shared = tuple(part for part in PARTS if part is not lone) if rng.random() < 0.7 else rng.sample(PARTS, 2)
    trained = rng.choice((PARTS, PARTS, tuple(rng.sample(PARTS, 2))))
    if not {*trained} & {*shared}:
        trained = PARTS
    if rng.random() < 0.2:
        trained = shared = (Part.R, *rng.choice(((), (Part.HEAD,))))
    return replace(PLAIN, labels=labels, trained=tuple(trained), shared=tuple(shared))


def walk(rng: random.Random) -> list[dict[str, Any]]:
    """What a native device does with the tasks of one round after the other."""
    kept: PrivateParts | None = None
    lone, rows = rng.choice(PARTS), []
    for number in range(ROUNDS):
        task, offered, trained = drawn_task(rng, lone), tensors(rng), tensors(rng)
        row: dict[str, Any] = {"task": json.loads(task.encode()), "offered": plain(offered), "refused": None}
        rows.append(row)
        try:
            check_unshared(kept, BASE_DIGEST, task)
        except ProtocolError as error:
            row["refused"] = str(error).partition("the part ")[2].split()[0]
            continue
        subject, plan = subject_of(BASE_DIGEST, task, Layout.of(offered)), number.to_bytes(32, "big")
        begun = with_private(offered, kept.start(subject, plan) if kept else None, task)
        if own := private_of(begun, task):
            after = files.encode(private_of(trained, task))
            kept = PrivateParts(
                subject, plan, files.encode(own), after, ever_private(kept, BASE_DIGEST, map(part_of, own))
            )
        row |= {"begun": plain(begun), "trained": plain(trained), "ever": sorted(private_on(kept, BASE_DIGEST))}
    return rows


def test_a_tab_keeps_and_refuses_what_a_native_device_keeps_and_refuses(tmp_path: Path, node: str) -> None:
    walks = [walk(random.Random(seed)) for seed in range(WALKS)]  # noqa: S311  # not secret
    rows = [row for rows in walks for row in rows]
    assert {row["refused"] for row in rows} == {None, *PARTS}
    loaded = [row for row in rows if row["refused"] is None and row["begun"] != row["offered"]]
    assert len(loaded) > WALKS
    path = tmp_path / "walks.json"
    path.write_text(json.dumps({"base": BASE_DIGEST, "layout": "c" * 64, "walks": walks}))
    run(node, "private.test.mjs", EDGEADAPT_PRIVATE=path)


# Sums without noise


FAR = [adapter(0), adapter(1)]
ADAPTERS = [
    *FAR,
    *(moved(each, LEAST / 5, part) for each in FAR for part in ("", "lora_A")),
    moved(FAR[0], 9.0, "head"),
]
TASKS = [TASK, TASK, TASK, MOMENTS, replace(TASK, epochs=2), replace(TASK, labels=("b", "a"))]
SPECS = [SPEC, SPEC, SPEC, SPEC, replace(SPEC, grouping=Grouping(2, 8)), replace(SPEC, base_digest="c" * 64)]
SURVIVORS = [SERIALS, SERIALS, WITHOUT_ONE, {name: SERIALS[name] for name in list(SERIALS)[1:15]}]


def history(rng: random.Random) -> dict[str, Any]:
    """Plans and sums as a hostile coordinator may send them, and what a native device's refusals are about."""
    key, events, plan, spec = rng.randbytes(32), list[dict[str, Any]](), None, SPEC
    known = SumHistory(key)
    for version in range(14):
        event: dict[str, Any] = {
            "blob": None,
            "survivors": None,
            "revoked": rng.choice(([], [], [100])),
            "refused": None,
        }
        try:
            if plan is None or rng.random() < 0.55:
                tensors, task, spec = rng.choice(ADAPTERS), rng.choice(TASKS), rng.choice(SPECS)
                blob = files.encode(tensors)
                plan = Plan(bytes(32), 1, ("a", "b"), version, files.sha256(blob), task.encode())
                event |= {"body": plan.encode().hex(), "offer": offer_of(spec), "blob": blob.hex()}
                known = sumhistory.on_plan(known, plan, task, spec, tensors, 0.05)
            else:
                event |= {"body": plan.encode().hex(), "offer": offer_of(spec), "survivors": rng.choice(SURVIVORS)}
                known = sumhistory.on_survivors(known, plan, spec, event["survivors"], event["revoked"]) or known
        except ProtocolError as error:
            event["refused"] = error.about
        events.append(event)
    return {"key": key.hex(), "share": 0.05, "events": events}


def test_sums_without_noise_are_judged_as_by_a_native_device(tmp_path: Path, node: str) -> None:
    rng, made = random.Random(5), tmp_path / "sums.json"  # noqa: S311  # not a secret
    histories = [history(rng) for _ in range(80)]
    abouts = {event["refused"] for each in histories for event in each["events"]}
    expected = {"plan.movement", "plan.terms", "plan.groups", "survivors.movement", "survivors.adapter"}
    assert abouts == {None, *expected}
    sketches = [
        {"blob": files.encode(each).hex(), "key": (key := rng.randbytes(32)).hex(), "sketch": sketch(each, key).hex()}
        for each in ADAPTERS
    ]
    made.write_text(json.dumps({"sketches": sketches, "histories": histories}))
    run(node, "sumhistory.test.mjs", EDGEADAPT_SUMS=made)
