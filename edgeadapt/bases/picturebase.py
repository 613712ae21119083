"""Bases of pictures as base folders: EfficientNet-Lite0 from its package, and image models that transformers saved.

Beside what transformers reads, ``config.json`` states how pixels become the model's numbers (``PIXEL_MEAN``,
``PIXEL_STD``), and there is a ``tokenizer.json`` of the kind ``Pixels``.

The lite networks are EfficientNets without gates (squeeze and excitation), and with ReLU6. transformers' class has a
gate in each block: here a constant, 1, which ``PictureEncoder`` removes.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aggregation.errors import ConfigError
from edgeadapt.bases.base import LONGEST, PICTURES, WEIGHTS
from edgeadapt.bases.ggufbase import write_base
from edgeadapt.bases.pictures import PIXEL_MEAN, PIXEL_STD, PictureReader
from edgeadapt.formats.layout import Floats
from edgeadapt.formats.storage import file_sha256, read

LITE0 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # SHA-256: a pickle is opened if it is known
SIDE, OPEN = 224, 40.0  # sigmoid(40) is 1 in float32
CONFIG = {
    "architectures": ["EfficientNetModel"],
    "model_type": "efficientnet",
    "dtype": "float32",
    "hidden_act": "relu6",
    "hidden_dim": 1280,
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "image_size": SIDE,
    "batch_norm_eps": 1e-3,
    "squeeze_expansion_ratio": 1e-9,  # one number a gate
    PIXEL_MEAN: [127.0] * 3,
    PIXEL_STD: [128.0] * 3,
}
PLACES = {  # of the package's names in transformers'
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
BLOCK_PLACES = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}


def convert(file: Path, folder: Path) -> None:
    """Write the base of ``file`` into the empty ``folder``: EfficientNet-Lite0's weights, or the
    ``preprocessor_config.json`` of a folder. Raises ConfigError: it is neither, or states what is not known here."""
    if file.name == PICTURES:
        return _copy(file.parent, folder)
    if file_sha256(file) != LITE0:
        raise ConfigError(f"{file} is not EfficientNet-Lite0: save the model with transformers", about=file.name)
    import torch  # in an extra, which other bases do not need

    stored = torch.load(file, map_location="cpu", weights_only=True)
    weights = dict(_named({name: value.contiguous().numpy() for name, value in stored.items()}))
    write_base(folder, weights, PictureReader(SIDE, SIDE, 3), config=CONFIG)
    return None


def _named(stored: Mapping[str, Floats]) -> Iterator[tuple[str, Floats]]:
    for name, value in stored.items():
        match name.split("."):
            case ["_blocks", number, part, kind]:
                yield f"encoder.blocks.{number}.{BLOCK_PLACES[part]}.{kind}", value
                if (part, kind) == ("_bn1", "bias"):
                    gate, width = f"encoder.blocks.{number}.squeeze_excite", len(value)
                    yield f"{gate}.reduce.weight", np.zeros((1, width, 1, 1), np.float32)
                    yield f"{gate}.reduce.bias", np.zeros(1, np.float32)
                    yield f"{gate}.expand.weight", np.zeros((width, 1, 1, 1), np.float32)
                    yield f"{gate}.expand.bias", np.full(width, OPEN, np.float32)
            case [part, kind] if part in PLACES:
                yield f"{PLACES[part]}.{kind}", value


def _copy(source: Path, folder: Path) -> None:
    try:
        stated = json.loads(read(source / PICTURES, LONGEST["config.json"]))
        config = json.loads(read(source / "config.json", LONGEST["config.json"]))
        size = stated.get("crop_size") or stated.get("size") or {}
        height, width = (int(size.get(name) or size["shortest_edge"]) for name in ("height", "width"))
        factor, channels = float(stated.get("rescale_factor", 1 / 255)), int(config.get("num_channels", 3))
        means, deviations = stated.get("image_mean") or [0] * channels, stated.get("image_std") or [1] * channels
        numbers = [[float(number) / factor for number in numbers] for numbers in (means, deviations)]
        if [*map(len, numbers)] != [channels] * 2 or not np.isfinite(numbers).all() or not all(numbers[1]):
            raise ValueError("means and deviations of colours")
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, OSError) as error:
        reason = f"{source / PICTURES} does not say how pictures are read: save the model and its processor again"
        raise ConfigError(reason, about=PICTURES) from error
    shutil.copyfile(source / WEIGHTS, folder / WEIGHTS)  # no link: the source may change in place
    written: dict[str, Any] = config | dict(zip((PIXEL_MEAN, PIXEL_STD), numbers, strict=True))
    (folder / "config.json").write_text(json.dumps(written, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(PictureReader(height, width, channels).to_str(), encoding="utf-8")
