"""`edgeadapt audit` as an outsider calls it: what it prints, what it exits with, and what it does not import."""

import base64
import datetime as dt
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from aggregation.entropy import SystemEntropy
from aggregation.errors import TrustError
from aggregation.pki import Authority
from aggregation.pki.identity import IdentityKey
from aggregation.pki.revocation import Revocation, RevocationList
from aggregation.transcript.entries import MAGIC, Checkpoint
from edgeadapt import program
from edgeadapt.auditing import AuditInput, AuditOptions, Check
from edgeadapt.auditing.transcripts import log_name, logs, vector_path
from tests.support import Run, refused
from tests.support.sessions import LoggedSession

LOG = log_name(1)


@pytest.fixture
def folder(tmp_path: Path, logged: LoggedSession) -> Path:
    """A run whose coordinator kept the transcript of the fixture's session, with its vectors."""
    transcripts = tmp_path / "run" / "coordinator" / "transcript"
    (transcripts / "vectors").mkdir(parents=True)
    (transcripts / LOG).write_bytes(logged.raw)
    (transcripts / "authority.pem").write_bytes(logged.fleet.authority.root.to_pem())
    (transcripts / "coordinator.pem").write_bytes(logged.fleet.key.public.to_pem())
    for digest, vector in logged.vectors.items():
        vector_path(transcripts / "vectors", digest).write_bytes(vector)
    return transcripts


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgeadapt", "audit", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            program.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def failures(run: Run, *arguments: object) -> dict[str, str]:
    """The failed checks of a session, and what each is about."""
    code, out, err = run("verify", *arguments, "--json")
    assert (code, len(err.splitlines())) == (4, 1)
    (session,) = json.loads(out)["sessions"]
    return {check["check"]: check["about"] for check in session["checks"] if check["status"] == "FAIL"}


def require(folder: Path, **accepted: bool) -> None:
    """What the command does after it printed the reports."""
    checked, accepted = AuditInput.open(folder, AuditOptions()), {"unfinished": False, **accepted}
    checked.require(checked.audit(**accepted), **accepted)


def damage(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_a_sound_run_passes_in_plain_words(run: Run, folder: Path) -> None:
    code, out, err = run("verify", folder.parents[1])
    assert (code, err) == (0, "")
    assert out.count("  pass  ") == 13
    assert "no step was answered twice" in out
    assert "bit for bit" in out
    assert "compare them with those that devices pin" in out


def test_json_is_one_object_that_names_each_check(run: Run, folder: Path, logged: LoggedSession) -> None:
    code, out, _ = run("verify", folder, "--json")
    printed = json.loads(out)
    (session,) = printed["sessions"]
    assert (code, printed["ok"], printed["error"]) == (0, True, None)
    statuses = {check["check"]: check["status"] for check in session["checks"]}
    assert list(statuses) == [check.value for check in Check]
    others = {"weaknesses": "warning", "adapters": "skipped"}  # its plans have no task that a device accepts
    assert statuses == dict.fromkeys(statuses, "pass") | others
    assert session["participation"] == logged.audit().participation
    assert session["dropouts_by_step"] == {}
    assert (printed["keys"]["coordinator"], printed["keys"]["pinned"]) == (logged.fleet.key.public.key_id, False)


def test_a_flipped_byte_ends_in_one_line_that_names_the_place(run: Run, folder: Path, logged: LoggedSession) -> None:
    damage(folder / LOG, logged.ends()[15] - 70)
    code, out, err = run("verify", folder)
    assert code == 4
    assert "FAIL" in out
    assert "not reached" in out
    assert len(err.splitlines()) == 1
    assert (
        f"{LOG}: the transcript does not pass the audit (signatures): entry 15 (masked-input of device-000, round 1)"
        in err
    )


@pytest.mark.parametrize(
    "header", [b"edgeadapt/transcript/2\n", b"edgeadapt/transcript/4\n", b"edgeadapt/transcript/3 "]
)
def test_a_log_with_another_header_ends_in_one_line(run: Run, folder: Path, header: bytes) -> None:
    sound = (folder / LOG).read_bytes()
    (folder / LOG).write_bytes(header + sound[len(MAGIC) :])
    for path in (folder, folder / LOG):
        code, out, err = run("verify", path)
        assert (code, len(err.splitlines())) == (4, 1)
        assert "does not begin with 'edgeadapt/transcript/3'" in err
        assert "FAIL" in out
    with refused(TrustError, "log", value=LOG):
        require(folder)


def test_without_vectors_the_sums_are_reported_as_skipped(run: Run, folder: Path) -> None:
    for path in (folder / "vectors").iterdir():
        path.unlink()
    code, out, _ = run("verify", folder)
    assert code == 0
    assert "skipped" in out
    assert "only digests of the masked updates were kept" in " ".join(out.split())


def test_a_pinned_authority_that_is_another_one_is_decisive(run: Run, folder: Path, logged: LoggedSession) -> None:
    times = (dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.datetime(2036, 1, 1, tzinfo=dt.UTC))
    pinned = folder.parents[1] / "pinned.pem"
    pinned.write_bytes(Authority.create("another", SystemEntropy(), *times).root.to_pem())
    assert failures(run, folder, "--authority", pinned) == {"identities": "certificate.issuer"}
    pinned.write_bytes(logged.fleet.authority.root.to_pem())
    code, out, _ = run("verify", folder, "--authority", pinned, "--coordinator", folder / "coordinator.pem")
    assert code == 0
    assert "the keys that you named" in out


def test_a_pinned_key_that_is_another_coordinators_is_decisive(run: Run, folder: Path) -> None:
    pinned = folder.parents[1] / "pinned.pem"
    pinned.write_bytes(IdentityKey.generate(SystemEntropy()).public.to_pem())
    assert failures(run, folder, "--coordinator", pinned) == {"log": "signature", "identities": "signature"}
    assert "entry 0 (offer)" in run("verify", folder, "--coordinator", pinned)[2]


@pytest.mark.parametrize(
    ("day", "code"),
    [("2025-12-31T23:59:59", 4), ("2026-01-01T00:00:00", 0), ("2026-01-01", 0), ("2026-11-25", 0), ("2036-01-02", 4)],
)
def test_dates_of_certificates_are_checked_if_the_day_is_given(run: Run, folder: Path, day: str, code: int) -> None:
    got, out, err = run("verify", folder, "--at", day)
    assert got == code
    if code:
        assert failures(run, folder, "--at", day) == {"identities": "certificate.validity"}
        assert "entry 0 (offer)" in err
        assert f"device-000 is not valid at {day[:10]}" in err
    else:
        assert f"valid on {day[:10]}" in " ".join(out.split())


@pytest.mark.parametrize(
    ("options", "code"), [((), 0), (("--at", "2026-06-02"), 4), (("--at", "2026-05-31"), 0)], ids=str
)
def test_a_revoked_device_counts_only_before_it_was_revoked(
    run: Run, folder: Path, logged: LoggedSession, options: tuple[str, ...], code: int
) -> None:
    authority, certificate = logged.fleet.authority, logged.fleet.devices["device-002"].certificate
    day, end = dt.datetime(2026, 6, 1, tzinfo=dt.UTC), dt.datetime(2026, 9, 1, tzinfo=dt.UTC)
    serial = x509.load_der_x509_certificate(certificate).serial_number
    listed = folder.parents[1] / "revoked.crl"
    listed.write_bytes(authority.revocations(3, {serial: Revocation(day)}, day, end).to_pem())
    got, out, err = run("verify", folder, "--revoked", listed, *options)
    assert got == code
    if code:
        assert failures(run, folder, "--revoked", listed, *options) == {"identities": "certificate.revoked"}
        assert "device-002 is revoked" in err
    else:
        assert "not on its revocation list 3 of 2026-06-01" in " ".join(out.split())


def test_an_older_revocation_list_than_one_of_the_coordinator_does_not_hide_a_revocation(
    run: Run, folder: Path, logged: LoggedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever hands the older list to the auditor hides the device that the newer one revokes."""
    authority, certificate = logged.fleet.authority, logged.fleet.devices["device-002"].certificate
    serial = x509.load_der_x509_certificate(certificate).serial_number
    day, end = dt.datetime(2026, 6, 1, tzinfo=dt.UTC), dt.datetime(2026, 9, 1, tzinfo=dt.UTC)
    old, newer = authority.revocations(3, {}, day, end), authority.revocations(4, {serial: Revocation(day)}, day, end)
    listed = folder.parents[1] / "old.crl"
    listed.write_bytes(old.to_pem())
    assert run("verify", folder, "--revoked", listed)[0] == 0
    for place in (folder, folder.parent):
        (folder.parent / "registry.db").touch()  # a state directory
        (place / "revoked.crl").write_bytes(newer.to_pem())
        with refused(TrustError, "revocations.number", value=3) as caught:
            AuditInput.open(folder, AuditOptions(revoked=listed))
        assert str(listed) in str(caught.value)
        (place / "revoked.crl").write_bytes(old.to_pem())
    (folder.parent / "registry.db").unlink()
    (folder / "revoked.crl").write_bytes(newer.to_pem())
    monkeypatch.setattr(RevocationList, "newer_than", lambda self, seen: self)
    assert run("verify", folder, "--revoked", listed)[0] == 0


def test_a_list_from_which_expired_certificates_have_gone_does_not_speak_for_them(
    run: Run, folder: Path, logged: LoggedSession
) -> None:
    """The authority leaves them out in time. The list of that time still counts, whatever newer ones there are."""
    authority = logged.fleet.authority
    loaded = [x509.load_der_x509_certificate(each.certificate) for each in logged.fleet.devices.values()]
    end = max(each.not_valid_after_utc for each in loaded)
    begin = max(each.not_valid_before_utc for each in loaded)
    at, month = begin + (end - begin) / 2, dt.timedelta(days=30)
    revoked = {loaded[2].serial_number: Revocation(begin)}
    old = authority.revocations(3, revoked, at, at + month)
    new = authority.revocations(9, {}, end + month, end + 2 * month)
    listed = folder.parents[1] / "given.crl"
    (folder / "revoked.crl").write_bytes(new.to_pem())
    listed.write_bytes(new.to_pem())
    code, out, _ = run("verify", folder, "--revoked", listed, "--at", f"{at:%Y-%m-%dT%H:%M:%S}")
    assert code == 0
    assert f"whether one of {len(loaded)} was revoked, which ended before that list" in " ".join(out.split())
    listed.write_bytes(old.to_pem())
    code, _, err = run("verify", folder, "--revoked", listed, "--at", f"{at:%Y-%m-%dT%H:%M:%S}")
    assert (code, "is revoked" in err) == (4, True)
    later = at + dt.timedelta(days=1)
    with refused(TrustError, "revocations.number", value=3):
        AuditInput.open(folder, AuditOptions(revoked=listed, at=later))


@pytest.mark.parametrize("at", [None, dt.datetime(2026, 5, 1, tzinfo=dt.UTC), dt.datetime(2026, 7, 1, tzinfo=dt.UTC)])
def test_two_different_lists_under_one_number_are_refused_at_any_time(
    folder: Path, logged: LoggedSession, at: dt.datetime | None
) -> None:
    day, end = dt.datetime(2026, 6, 1, tzinfo=dt.UTC), dt.datetime(2026, 9, 1, tzinfo=dt.UTC)
    one, other = (logged.fleet.authority.revocations(3, some, day, end) for some in ({}, {7: Revocation(day)}))
    listed = folder.parents[1] / "given.crl"
    listed.write_bytes(one.to_pem())
    (folder / "revoked.crl").write_bytes(other.to_pem())
    with refused(TrustError, "revocations.number", value=3):
        AuditInput.open(folder, AuditOptions(revoked=listed, at=at))
    (folder / "revoked.crl").write_bytes(one.to_pem())
    AuditInput.open(folder, AuditOptions(revoked=listed, at=at))


@pytest.mark.parametrize(("at", "code"), [("2026-05-01", 0), ("2026-09-01T00:00:00", 0), ("2026-09-01", 4)])
def test_a_revocation_list_that_had_expired_by_the_time_of_the_sessions_says_nothing(
    run: Run, folder: Path, logged: LoggedSession, monkeypatch: pytest.MonkeyPatch, at: str, code: int
) -> None:
    """A later one is no problem: it has the earlier revocations too. Without the check an old one seems to say all."""
    day, end = dt.datetime(2026, 6, 1, tzinfo=dt.UTC), dt.datetime(2026, 9, 1, tzinfo=dt.UTC)
    listed = folder.parents[1] / "revoked.crl"
    listed.write_bytes(logged.fleet.authority.revocations(3, {}, day, end).to_pem())
    got, out, err = run("verify", folder, "--revoked", listed, "--at", at)
    assert got == code
    assert ("valid until 2026-09-01" in err, "not on its revocation list 3" in " ".join(out.split())) == (
        code == 4,
        code == 0,
    )
    monkeypatch.setattr("edgeadapt.auditing.auditor._require_in_force", lambda crl, at: None)
    assert run("verify", folder, "--revoked", listed, "--at", at)[0] == 0


def test_a_revocation_list_of_another_authority_is_refused(folder: Path) -> None:
    times = (dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.datetime(2036, 1, 1, tzinfo=dt.UTC))
    listed = folder.parents[1] / "revoked.crl"
    listed.write_bytes(Authority.create("another", SystemEntropy(), *times).revocations(1, {}, *times).to_pem())
    with refused(TrustError, "revocations.signature") as caught:
        AuditInput.open(folder, AuditOptions(revoked=listed))
    assert str(listed) in str(caught.value)


def test_a_session_under_way_passes_with_unfinished_only(run: Run, folder: Path, logged: LoggedSession) -> None:
    (folder / LOG).write_bytes(logged.raw[: logged.ends()[30]])
    code, out, err = run("verify", folder)
    assert (code, "--unfinished" in err) == (8, True)
    assert re.search(r"^  not closed +log ", out, re.MULTILINE)
    assert "FAIL" not in out
    assert run("show", folder)[1].splitlines()[-1].startswith("not closed: ")
    assert run("verify", folder, "--unfinished")[0] == 0


def test_a_log_that_another_one_follows_was_cut_if_it_is_not_closed(
    run: Run, folder: Path, logged: LoggedSession
) -> None:
    (folder / LOG).write_bytes(logged.raw[: logged.ends()[30]])
    (folder / log_name(2)).write_bytes(logged.raw)
    for option in ((), ("--unfinished",)):
        code, out, err = run("verify", folder, *option)
        assert (code, "session-000001.log is not closed, and session-000002.log follows it" in err) == (4, True)
        assert re.search(r"^  FAIL +sessions ", out, re.MULTILINE)
    with refused(TrustError, "session.cut", value=LOG):
        require(folder)


def test_a_session_that_has_just_begun_does_not_name_its_predecessor_yet(
    run: Run, folder: Path, logged: LoggedSession
) -> None:
    first = next(entry for entry in logged.entries if entry.kind == Checkpoint.TAG).index
    begun = folder / "session-000002.log"
    begun.write_bytes(logged.raw[: logged.ends()[first - 1]])
    assert run("verify", folder, "--unfinished")[0] == 0
    assert run("verify", folder)[0] == 8
    begun.write_bytes(logged.raw[: logged.ends()[first]])
    assert run("verify", folder, "--unfinished")[0] == 4
    with refused(TrustError, "session", value=begun.name):
        require(folder, unfinished=True)


def test_a_session_that_is_left_out_is_missed(run: Run, folder: Path, logged: LoggedSession) -> None:
    (folder / "session-000002.log").write_bytes(logged.raw)  # it says that it is the coordinator's first session
    code, out, err = run("verify", folder)
    assert (code, "session-000002.log does not follow session-000001.log: a session is missing" in err) == (4, True)
    assert re.search(r"^  FAIL +sessions +session-000002.log does not follow", out, re.MULTILINE)
    assert re.search(r"^checks: .*1 FAIL", out, re.MULTILINE)
    with refused(TrustError, "session", value="session-000002.log"):
        require(folder)


def test_files_next_to_the_logs_that_are_not_audited_are_named(run: Run, folder: Path, logged: LoggedSession) -> None:
    """A log that the coordinator would rather not show can lie there under another name."""
    for name in ("session-2.log", "session-000002.log.old", "session-000001 (copy).log"):
        (folder / name).write_bytes(b"")
    words = " ".join(run("verify", folder)[1].split())
    assert words.endswith("session-000001 (copy).log, session-000002.log.old, session-2.log")
    printed = json.loads(run("verify", folder, "--json")[1])
    assert (len(printed["sessions"]), len(printed["unread"]), printed["complete"]) == (1, 3, True)


def test_the_name_of_a_file_cannot_forge_a_line(run: Run, folder: Path) -> None:
    (folder / "x\n\x1b[2J  pass         adapters").touch()
    out = run("verify", folder)[1]
    assert "not checked: " in out.splitlines()[-1]
    assert r"x\n\x1b[2J  pass" in out.splitlines()[-1]


def test_logs_in_another_folder_do_not_hide_those_of_the_coordinator(run: Run, folder: Path) -> None:
    shutil.copytree(folder, folder.parents[1] / "transcript")
    code, out, err = run("verify", folder.parents[1])
    assert (code, out) == (5, "")
    assert "has logs in transcript and in coordinator/transcript" in err


def test_a_kept_vector_is_not_read_beyond_its_length(run: Run, folder: Path) -> None:
    vector = next((folder / "vectors").iterdir())
    size = vector.stat().st_size
    os.truncate(vector, size + 1)
    code, _, err = run("verify", folder)
    assert (code, f"{vector} has {size + 1} bytes, more than the limit of {size}" in err) == (5, True)


def test_a_single_log_does_not_pass_for_all_sessions(run: Run, folder: Path) -> None:
    assert "the coordinator's other sessions (name the folder)" in run("verify", folder / LOG)[1]
    assert "other sessions" not in run("verify", folder)[1]
    assert json.loads(run("verify", folder / LOG, "--json")[1])["complete"] is False


def test_logs_are_in_the_order_of_their_sessions_beyond_six_digits(tmp_path: Path) -> None:
    names = [log_name(number) for number in (999_999, 1_000_000, 9)]
    for name in (*names, "session-10.log", "session-\u0661.log"):
        (tmp_path / name).touch()
    assert [path.name for path in logs(tmp_path)] == [names[2], names[0], names[1]]


def test_a_first_session_that_is_left_out_is_missed(run: Run, folder: Path, logged: LoggedSession) -> None:
    (folder / LOG).unlink()
    (folder / "session-000002.log").write_bytes(logged.rewritten(previous=bytes([1]) * 32))
    assert run("verify", folder)[0] == 4
    with refused(TrustError, "session", value="session-000002.log"):
        require(folder)
    assert run("verify", folder / "session-000002.log")[0] == 0  # a single log need not be the first


@pytest.mark.parametrize("name", ["authority.pem", "coordinator.pem", "revoked.crl"])
def test_a_flipped_byte_anywhere_in_a_file_next_to_the_logs_is_found(
    run: Run, folder: Path, logged: LoggedSession, name: str
) -> None:
    """Also where the bytes have the same meaning: in the line breaks of a PEM file."""
    times = (dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.datetime(2036, 1, 1, tzinfo=dt.UTC))
    (folder / "revoked.crl").write_bytes(logged.fleet.authority.revocations(1, {}, *times).to_pem())
    assert run("verify", folder)[0] == 0
    sound = (folder / name).read_bytes()
    for at in range(len(sound)):
        damage(folder / name, at)
        code, _, err = run("verify", folder)
        assert code == 4, at
        assert name in err or "entry 0 (offer)" in err  # another well-formed key, which signed nothing
        (folder / name).write_bytes(sound)


def test_a_warning_of_a_library_is_not_printed_with_an_error(folder: Path) -> None:
    der = bytearray(x509.load_pem_x509_certificate((folder / "authority.pem").read_bytes()).public_bytes(Encoding.DER))
    serial = der.index(b"\x02\x01\x02\x02") + 5
    der[serial] |= 0x80  # a negative serial number, which cryptography warns of
    text = base64.b64encode(der).decode()
    (folder / "authority.pem").write_text(f"-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n")
    command = [sys.executable, "-m", "edgeadapt", "audit", "verify", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(program.__file__).parents[1])
    assert (done.returncode, len(done.stderr.splitlines())) == (4, 1)
    assert f"{folder / 'authority.pem'}" in done.stderr


@pytest.mark.parametrize("name", [LOG, "authority.pem"])
def test_a_file_of_any_size_ends_in_one_line(run: Run, folder: Path, name: str) -> None:
    os.truncate(folder / name, 2**38)  # holes: they take no space
    code, _, err = run("verify", folder)
    assert (code, len(err.splitlines())) == (5, 1)
    assert f"{folder / name} has {2**38} bytes" in err


def test_show_lists_rounds_survivors_and_dropouts(run: Run, folder: Path) -> None:
    code, out, _ = run("show", folder)
    assert code == 0
    time = "2026-02-02T02:40:00Z"
    assert out.startswith(f"{LOG}  {time}  {time}\n")
    assert (
        f"round   1  {time}  produced adapter 1 (abababababab); in the sum: 3 of 4; dropped out: device-001 at plan\n"
        in out
    )
    assert (
        f"round   2  {time}  produced adapter 2 (abababababab); in the sum: 4 of 4; left later: device-002 at unmask\n"
        in out
    )
    assert (
        f"round   3  {time}  aborted (too-few); in the sum: 0 of 4; dropped out: device-000, device-001 at plan\n"
        in out
    )
    rounds = json.loads(run("show", folder, "--json")[1])["sessions"][0]["rounds"]
    assert {(each["began"], each["ended"]) for each in rounds} == {(time, time)}
    assert [each["dropouts_by_step"] for each in rounds] == [
        {"plan": ["device-001"]},
        {"unmask": ["device-002"]},
        {"plan": ["device-000", "device-001"]},
    ]
    assert "device-000 2, device-001 1" in out


@pytest.mark.parametrize(
    ("missing", "code", "reason"),
    [
        ("authority.pem", 4, "name the file with --authority"),
        ("coordinator.pem", 4, "name the file with --coordinator"),
        (LOG, 5, "has no transcript"),
    ],
)
def test_a_missing_file_is_named_in_one_line(run: Run, folder: Path, missing: str, code: int, reason: str) -> None:
    (folder / missing).unlink()
    got, out, err = run("verify", folder)
    assert (got, out) == (code, "")
    assert reason in err
    assert len(err.splitlines()) == 1


def test_an_auditor_needs_no_framework() -> None:
    script = "import sys, edgeadapt, edgeadapt.cli.audit; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "aggregation" in loaded
    assert not loaded & {"flwr", "onnx", "onnxruntime", "peft", "safetensors", "sqlalchemy", "torch"}
