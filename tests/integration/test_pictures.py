"""A folder of pictures by client and label becomes a federation, a bundle that answers, and one that learns."""

import json
from pathlib import Path

import numpy as np
import pytest

from aggregation.errors import DataError
from edgeadapt.bases.pictures import picture
from tests.simulations.data.test_tables import picture_rows
from tests.support import Run, refused
from tests.support.pictures import LABELS, SIDE, file_of, make_base, stripes

SCENARIO = """
name = "stripes"
seed = 0

[data]
files = ["own"]
client = "client"

[base]
model = "{base}"
engine = "onnx"

[adapter]
layers = 1
rank = 2

[federation]
rounds = 2

[federation.training]
batch_size = 8
learning_rate = 0.01

[network]
message_loss = 0.0
forced_dropouts = 0

[personal]
epochs = 2
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the protocol on a small ViT, with the training graph."""
    from click.testing import CliRunner

    from edgeadapt import program

    folder = tmp_path_factory.mktemp("stripes")
    make_base(folder / "model", "vit")
    picture_rows(folder / "own")
    (folder / "stripes.toml").write_text(SCENARIO.format(base=folder / "model"))
    command = ["simulate", "run", str(folder / "stripes.toml"), "--out", str(folder / "run"), "--engine", "protocol"]
    done = CliRunner().invoke(program.cli, [*command, "--quiet"])
    assert done.exit_code == 0, done.stderr
    return folder / "run"


def bundle_of(run: Path) -> Path:
    return min((run / "devices").glob("*/bundle"))


def test_the_run_is_audited_and_its_report_quotes_no_picture(finished: Path, run: Run) -> None:
    code, _, err = run("audit", "verify", finished)
    assert code == 0, err
    report = (finished / "report.html").read_text()
    assert "data:image/png" not in report
    assert "PICTURE.png" in report
    assert "data:image/png" not in (finished / "run.log").read_text()


def test_a_device_names_what_is_in_the_file_of_a_picture(finished: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(stripes(0, 9))
    code, out, err = run("device", "infer", "--bundle", bundle_of(finished), "--top", 2, "--json", tmp_path / "a.png")
    assert code == 0, err
    (answers,) = json.loads(out)["adapters"]
    (answer,) = answers["answers"]
    assert answer["text"] == str(tmp_path / "a.png")
    assert {one["intent"] for one in answer["intents"]} == {*LABELS}


@pytest.mark.parametrize("content", [b"", b"no picture"])
def test_a_file_that_is_no_picture_gets_one_line(finished: Path, run: Run, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    code, out, err = run("device", "infer", "--bundle", bundle_of(finished), tmp_path / "a.png")
    assert (code, out) == (5, "")
    assert err.count("\n") == 1
    assert "neither PNG, JPEG nor WebP" in err
    code, out, err = run("device", "infer", "--bundle", bundle_of(finished), "turn on the light")
    assert (code, out) == (5, "")
    assert "No such file" in err


def test_a_device_learns_from_a_picture(finished: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(file_of(np.full((SIDE, SIDE, 3), (250, 20, 20))))
    bundle = bundle_of(finished)
    code, out, err = run("device", "infer", "--bundle", bundle, "--json", tmp_path / "a.png")
    (other,) = {*LABELS} - {json.loads(out)["adapters"][0]["answers"][0]["intents"][0]["intent"]}
    code, out, err = run("device", "infer", "--bundle", bundle, "--teach", other, tmp_path / "a.png")
    assert code == 0, err
    assert "1 of 1 learned" in out
    assert "a picture of" in out
    assert "base64" not in out
    code, out, err = run("device", "infer", "--bundle", bundle, "--json", tmp_path / "a.png")
    assert json.loads(out)["adapters"][0]["answers"][0]["intents"][0]["intent"] == other


def test_python_reads_the_file_of_a_picture(finished: Path, tmp_path: Path) -> None:
    import edgeadapt

    (tmp_path / "a.png").write_bytes(stripes(0, 9))
    model = edgeadapt.load(bundle_of(finished))
    answer = model(str(tmp_path / "a.png"))
    assert answer == model(picture(stripes(0, 9)))
    with refused(DataError, "picture", "No such file"):
        model("turn on the light")
