"""Pictures and small bases of pictures, with random weights."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from edgeadapt.bases.base import Base, find_base
from edgeadapt.bases.pictures import picture

SIDE = 16
LABELS = ("across", "down")


def file_of(pixels: Any, kind: str = "PNG", **settings: Any) -> bytes:
    """Write an array of bytes, ``(height, width)`` or ``(height, width, 3)``, as an image file."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, kind, **settings)
    return file.getvalue()


def stripes(label: int, seed: int) -> bytes:
    """Draw noisy stripes, ``LABELS[label]``, as a PNG file."""
    rng = np.random.default_rng(seed)
    rows = 200 * ((np.arange(SIDE) + rng.integers(4)) // 2 % 2)[:, None] + rng.integers(0, 55, (SIDE, SIDE))
    return file_of(np.repeat((rows if label == 0 else rows.T)[..., None], 3, 2))


def shapes(seed: int) -> bytes:
    """Draw grey rectangles on each other, as a PNG file."""
    rng = np.random.default_rng(seed)
    pixels = np.full((SIDE, SIDE), rng.integers(0, 80))
    for _ in range(4):
        (y, x), (height, width) = rng.integers(0, SIDE - 4, 2), rng.integers(3, 9, 2)
        pixels[y : y + height, x : x + width] = rng.integers(0, 256)
    return file_of(pixels)


def stripe_pictures(count: int, seed: int) -> list[tuple[str, int]]:
    return [(picture(stripes(number % 2, 1000 * seed + number)), number % 2) for number in range(count)]


def make_base(folder: Path, kind: str, positions: float = 1.0) -> Base:
    """Save a tiny ``vit`` or ``mobilenet_v2`` as transformers does, and open it. A ViT sees where a patch is by numbers
    of ``positions`` times the size of other weights."""
    from transformers import MobileNetV2Config, MobileNetV2Model, ViTConfig, ViTModel

    if kind == "vit":
        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
        model: Any = ViTModel(ViTConfig(image_size=SIDE, patch_size=4, **sizes))
    else:
        model = MobileNetV2Model(MobileNetV2Config(image_size=SIDE, depth_multiplier=0.25))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2, generator=generator)
            elif value.is_floating_point() and value.ndim > 1:
                value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
                value.mul_(positions if name.endswith("position_embeddings") else 1.0)
    model.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    stated = {"size": size, "rescale_factor": 1 / 255, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}
    (folder / "preprocessor_config.json").write_text(json.dumps(stated))
    return find_base(str(folder))
