"""The commands of docs/how-to/govern-adapters.md, as its reader would run them."""

import shutil
import sys
from pathlib import Path

import pytest

from edgeadapt.bases.base import Base
from edgeadapt.formats.storage import PRIVATE
from edgeadapt.releases.history import audit_repository
from tests.docs.conftest import ROOT, Reader, blocks_of
from tests.edgeadapt.releases.conftest import Vendor
from tests.edgeadapt.releases.test_gates import Place


@pytest.mark.slow
def test_the_page_takes_a_version_from_a_round_to_a_channel_and_back(
    vendor_place: Vendor, tiny_base: Base, tmp_path: Path
) -> None:
    work, made = tmp_path / "work", Place(vendor_place, tmp_path)
    (work / "next").mkdir(parents=True)
    vendor_place.publish(1)
    shutil.copytree(vendor_place.bundle, work / "bundle")
    (made.folder / "trust.pem").write_bytes(vendor_place.key.public.to_pem())
    answers = made.answers(1)
    made.held_out(answers)
    shutil.copyfile(made.folder / "held-out.tsv", work / "held-out.tsv")
    rows = [line.split("\t") for line in (work / "held-out.tsv").read_text().splitlines()]
    (work / "canaries.tsv").write_text("\n".join(f"{label}\t{phrase}" for label, phrase, _ in rows[:3]))
    (work / "texts.txt").write_text("\n".join(phrase for _, phrase, _ in rows[:12]))
    (work / "trust.pem").write_bytes(vendor_place.key.public.to_pem())
    (work / "vendor.key").write_bytes(vendor_place.key.to_pem())
    (work / "vendor.key").chmod(PRIVATE)
    vendor_place.publish(1, version=3)
    shutil.copytree(vendor_place.bundle, work / "next" / "bundle")
    shutil.copytree(vendor_place.state_dir, work / "fleet")
    shutil.copytree(tiny_base.folder, work / "base")
    program = tmp_path / "bin" / "edgeadapt"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.support.traces "$@"\n')
    reader = Reader(work, program.parent)
    printed = [reader.run(block.commands) for block in blocks_of(ROOT / "docs" / "how-to" / "govern-adapters.md")]
    assert "canary 1" in printed[0]
    assert printed[3].count("passed  parity of global") == 2  # printed, and in the log
    assert (work / "peft-1" / "adapter_model.safetensors").is_file()
    assert "stable, release 3: global 4" in printed[4]
    kinds = [record.action.kind for record in audit_repository(work / "releases", None).records]
    assert kinds == ["init", "publish", "promote", "publish", "promote", "rollback"]
