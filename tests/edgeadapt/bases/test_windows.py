"""The base that is drawn at random, for windows of sensors."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from aggregation.errors import ConfigError, DataError
from client.cli.options import printable
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import WEIGHTS, find_base
from edgeadapt.bases.sounds import RATE, SoundReader, is_window, signal
from edgeadapt.bases.windowbase import DILATIONS, KERNELS, TAPS, draw, write
from tests.support import refused

NAME, READER = "convolutions:50:40:3", SoundReader(50, 40, 3)
WINDOW = np.random.default_rng(0).integers(-9000, 9000, (40, 3))


def test_the_weights_are_known_and_another_seed_has_others() -> None:
    drawn = hashlib.sha256(b"".join(value.tobytes() for value in draw(3, 0).values())).hexdigest()
    assert drawn == "86b38e3377d191fcbc0361089e53428520aaecda7fa3eac8803dae1891f9819c"
    weight, other = (draw(3, seed)["layer.1.dense.weight"] for seed in (0, 1))
    kernels = weight.reshape(KERNELS, TAPS, 3)
    assert np.abs(kernels.sum(1)).max() < 1e-6
    assert np.allclose((weight**2).sum(1), 1)
    assert not np.array_equal(weight, other)


def test_a_base_is_written_once_for_a_name(tmp_path: Path) -> None:
    base = find_base(NAME)
    assert find_base(NAME) == base
    write(tmp_path, 50, 40, 3)
    assert find_base(str(tmp_path)).digest == base.digest
    assert find_base("convolutions:50:41:3").digest != base.digest
    assert pretrained.tokenizer(base) == READER


def test_the_states_are_what_convolutions_give() -> None:
    """Each convolution by numpy's own, a moment at a time."""
    base, weights = find_base(NAME), draw(3, 0)
    encoder = pretrained.encoder(base)
    with torch.inference_mode():
        (states,) = encoder(torch.tensor(READER.encode(signal(WINDOW, 50)).ids)[None])
    waves = WINDOW / 2**15
    level, power = waves.mean(0), waves.var(0) + 1e-6
    waves = (waves - level) / np.sqrt(power.mean())
    shares, most = list[float](), list[float]()
    kernels = weights["layer.1.dense.weight"].reshape(KERNELS, TAPS, 3)
    for dilation in DILATIONS:
        for kernel, offset in zip(kernels, weights["layer.1.dense.bias"], strict=True):
            wide = np.zeros((dilation * (TAPS - 1) + 1, 3))
            wide[::dilation] = kernel[::-1]
            pad = len(wide) // 2
            found = offset + sum(np.convolve(np.pad(waves[:, at], pad), wide[:, at], "valid") for at in range(3))
            shares.append(np.clip(found + 0.5, 0, 1).mean())
            most.append(0.1 * found.max())
    expected = [*shares, *most, *(5 * level), *(0.15 * np.log(power))]
    assert states.shape == (1, 1, encoder.config.hidden_size)
    assert np.abs(states[0, 0].numpy() - expected).max() < 1e-5


def test_a_silent_window_has_finite_states() -> None:
    with torch.inference_mode():
        assert pretrained.encoder(find_base(NAME))(torch.zeros(1, READER.size, dtype=torch.int64))[0].isfinite().all()


@pytest.mark.parametrize(("rate", "channels"), [(100, 3), (50, 6)])
def test_a_window_of_another_rate_or_number_of_channels_is_refused(rate: int, channels: int) -> None:
    with refused(DataError, "sound", "3 channels at 50 Hz"):
        pretrained.tokenizer(find_base(NAME)).encode(signal(np.ones((40, channels), int), rate))


@pytest.mark.parametrize("name", ["convolutions:0:40:3", "convolutions:50:999999:3", "convolutions:50:40:65"])
def test_sizes_out_of_range_are_refused(name: str) -> None:
    with refused(ConfigError, "base", "1 to 131072 samples of 1 to 64 channels"):
        find_base(name)


@pytest.mark.parametrize(
    "name", ["convolutions", "convolutions:50:40", "convolutions:50:40:3:../x", "convolutions:-1:4:3"]
)
def test_other_names_draw_nothing(name: str) -> None:
    with refused(ConfigError, "base"):
        find_base(name)


@pytest.mark.parametrize("channels", [6, 10**9, "3", None])
def test_another_number_of_channels_than_the_weights_have_is_refused(tmp_path: Path, channels: object) -> None:
    shutil.copytree(find_base(NAME).folder, tmp_path, dirs_exist_ok=True)
    stated = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stated | {"channels": channels}))
    with refused(ConfigError, "base"):
        pretrained.encoder(find_base(str(tmp_path)))


def test_a_reader_of_other_channels_than_the_base_is_refused(tmp_path: Path) -> None:
    shutil.copytree(find_base(NAME).folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text(SoundReader(50, 40, 6).to_str())
    with refused(ConfigError, "tokenizer.json", "3 channels, not 6"):
        pretrained.encoder(find_base(str(tmp_path)))


def test_a_base_without_its_kernels_is_refused(tmp_path: Path) -> None:
    shutil.copytree(find_base(NAME).folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / WEIGHTS)
    save_file({name: weights[name] for name in weights if "dense" not in name}, tmp_path / WEIGHTS, {"format": "pt"})
    with refused(ConfigError, "base"):
        pretrained.encoder(find_base(str(tmp_path)))


def test_a_window_is_called_so() -> None:
    assert printable(signal(WINDOW, 50)).startswith("a window of sensors of ")
    assert printable(signal(WINDOW[:, :1], RATE)).startswith("a sound of ")
    assert [is_window(text) for text in ("", "data:audio/wav;base64,?", "data:image/png;base64,AAAA")] == [False] * 3
