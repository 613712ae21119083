"""How long a device takes for the masks of one contribution, in JavaScript under Node and natively, in the same run.

    .venv/bin/python -m tests.browser.measure_masks [--elements 85000] [--neighbors 12]

It prints the best and the median of each. The ring has 16 bits; both use one thread.
"""

import argparse
import json
import os
import secrets
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np

from aggregation import masks
from aggregation.masks import Mask
from tests.support import programs

SCRIPT = Path(__file__).parent / "js" / "aggregation" / "measure.mjs"
Times = dict[str, list[float]]  # milliseconds


def native(elements: int, neighbors: int, repeats: int) -> Times:
    """The times of a native device."""
    publics = {f"{'az'[i % 2]}{i}": masks.public_key(secrets.token_bytes(32)) for i in range(neighbors)}
    own, seed, vector = secrets.token_bytes(32), secrets.token_bytes(32), np.zeros(elements, np.uint16)
    times: Times = {"keys": [], "masks": []}
    for _ in range(repeats):
        start = time.perf_counter()
        found = masks.pair_masks(own, "m", publics, bytes(32), bytes(32))
        found.append(Mask(masks.self_key(seed, bytes(32), bytes(32), "m"), add=True))
        middle = time.perf_counter()
        masks.apply(vector, found)
        times["keys"].append(1000 * (middle - start))
        times["masks"].append(1000 * (time.perf_counter() - middle))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=85_000)
    parser.add_argument("--neighbors", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=50)
    given = parser.parse_args()
    arguments = [str(each) for each in (given.elements, given.neighbors, given.repeats)]
    done = subprocess.run([programs.node(), str(SCRIPT), *arguments], capture_output=True, text=True, check=True)
    found = {"Node": json.loads(done.stdout), "native": native(given.elements, given.neighbors, given.repeats)}
    print(f"{given.elements} elements, {given.neighbors} neighbors; load {os.getloadavg()[0]:.1f}; ms: best, median")
    for name, times in found.items():
        columns = "  ".join(f"{part} {min(each):.2f} {statistics.median(each):.2f}" for part, each in times.items())
        print(f"{name:7}{columns}")


if __name__ == "__main__":
    main()
