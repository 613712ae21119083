"""The benchmark of questions measures labels that help, and no labels that do not."""

import numpy as np

from benchmarks.questions import ASKED, FEW, MANY, shares, table


def test_labels_of_a_device_help_and_all_of_them_most() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 8, 400)
    centers = rng.standard_normal((8, 16)).astype(np.float32)
    texts = centers[labels] + 0.8 * rng.standard_normal((400, 16), np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    pool, test = (texts[:200], labels[:200]), (texts[200:], labels[200:])
    found = shares(np.zeros((17, 8)), pool, test, rng)
    assert found["none"] < found[f"random {FEW}"] < found[f"random {MANY}"] < found["all"]
    assert found["none"] < found[f"asked {FEW}"] <= found["all"]
    few = shares(np.zeros((17, 8)), (texts[:5], labels[:5]), test, rng)
    assert few[f"asked {FEW}"] == few["all"] == few[f"newest {MANY}"]


def test_the_table_has_what_asking_gains() -> None:
    rows = [{"none": 0.5, f"asked {FEW}": 0.75}, {"none": 0.25, f"asked {FEW}": 0.5}]
    assert table(rows, ASKED).splitlines()[1].split() == ["none", "0.375", "+0.250", "(+0.250", "to", "+0.250)"]
