"""The benchmark of retrieval counts sections that are found, with a real base and the real peer."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import bench
from benchmarks.retrieval import questions
from edgeadapt.formats.passages import Passage
from tests.client.inference.test_passages import encoder as encoder


def test_a_heading_that_two_files_have_or_of_one_word_is_no_question() -> None:
    headings = [("a", "Start here"), ("b", "Start here"), ("a", "14.2. The boiler room"), ("a", "Boiler"), ("a", "")]
    assert questions([Passage(source, heading, "text") for source, heading in headings]) == {
        "14.2. The boiler room": "The boiler room"
    }


def test_headings_find_their_sections(encoder: Path, tmp_path: Path) -> None:
    sections = {"Kitchen lights": "turn on the lights of the kitchen", "Play music": "music is played in the evening"}
    (tmp_path / "a.md").write_text("\n".join(f"# {heading}\n{text}" for heading, text in sections.items()))
    result = CliRunner().invoke(bench, ["retrieval", str(tmp_path), "--bundle", str(encoder)])
    assert result.exit_code == 0, result.output
    rows = dict(line.split() for line in result.stdout.splitlines())
    assert (rows["passages"], rows["questions"], rows["hybrid"]) == ("2", "2", "1.000")
    assert float(rows["p95_ms"]) >= float(rows["median_ms"]) > 0


def test_a_folder_without_questions_is_refused(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# Word\ntext")
    with pytest.raises(Exception, match="no heading"):
        CliRunner().invoke(bench, ["retrieval", str(tmp_path), "--bundle", str(encoder)], catch_exceptions=False)
