"""Every command of `edgeadapt` explains itself, and says in one line what was wrong with how it was called."""

import errno
import io
import json
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr
from typing import Any

import click
import pytest

from edgeadapt import program
from edgeadapt.commandline import JsonLines, LogHandler, relayed
from tests.support import Run

Path = tuple[str, ...]  # the words of a command, without the program's own


def commands(group: click.Group, path: Path = ()) -> Iterator[tuple[Path, click.Command]]:
    """Every command below ``group``, groups included."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = dict(commands(program.cli))
GROUPS = [(), *(path for path, command in ALL.items() if isinstance(command, click.Group))]
EXTRAS = {"flwr", "matplotlib", "onnx", "peft", "rich", "safetensors", "sqlalchemy", "torch", "transformers"}
LEAVES = [path for path in ALL if path not in GROUPS]


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_help_has_an_example_of_the_command_and_a_word_on_each_option(path: Path, run: Run) -> None:
    code, out, err = run(*path, "--help")
    assert (code, err) == (0, "")
    assert f"\n    edgeadapt {' '.join(path)} " in out or f"\n    edgeadapt {' '.join(path)}\n" in out
    options = [each for each in ALL[path].params if isinstance(each, click.Option)]
    assert [option.name for option in options if not option.help] == []


def test_no_option_is_a_range_that_admits_nan() -> None:
    ranges = [
        (path, each)
        for path, command in ALL.items()
        for each in command.params
        if isinstance(each.type, click.FloatRange)
    ]
    assert ranges
    for path, option in ranges:
        with pytest.raises(click.BadParameter):
            option.type.convert("nan", option, click.Context(ALL[path]))


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: " ".join(path) or "edgeadapt")
def test_a_group_without_a_command_lists_its_commands_each_in_a_whole_line(path: Path, run: Run) -> None:
    code, out, err = run(*path)
    assert (code, err) == (0, "")
    listed = re.findall(r"^  [a-z].*", re.split(r"^(?:Commands|Start):$", out, flags=re.MULTILINE)[1], re.MULTILINE)
    assert [line.split()[0] for line in listed] == [each[-1] for each in ALL if each[:-1] == path]
    assert [line for line in listed if line.endswith("...")] == []


def wrong_calls() -> Iterator[Any]:
    yield from (pytest.param((*path, "nonsense"), id=f"{' '.join(path)} nonsense") for path in GROUPS)
    yield from (pytest.param((*path, "--nonsense"), id=f"{' '.join(path)} --nonsense") for path in ALL)
    yield from (
        pytest.param(path, id=f"{' '.join(path)} …") for path in LEAVES if any(p.required for p in ALL[path].params)
    )


@pytest.mark.parametrize("words", wrong_calls())
def test_a_wrong_call_ends_in_one_line_that_names_the_help(words: Path, run: Run) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("edgeadapt: ")
    assert err.count("\n") == 1
    command = " ".join(("edgeadapt", *(words if words in ALL else words[:-1])))
    assert err.endswith(f"see '{command} --help'\n")


def test_a_mistyped_command_is_told_the_one_that_was_meant(run: Run) -> None:
    line = "edgeadapt: No such command 'devise'; did you mean 'device'? see 'edgeadapt --help'\n"
    assert run("devise") == (2, "", line)
    line = "edgeadapt: No such command 'lsit'; did you mean 'list'? see 'edgeadapt bundle --help'\n"
    assert run("bundle", "lsit") == (2, "", line)
    line = (
        "edgeadapt: No such command 'fashion.toml'; did you mean 'run fashion.toml'? see 'edgeadapt simulate --help'\n"
    )
    assert run("simulate", "fashion.toml") == (2, "", line)
    assert "No such command" in run("simulate", "a" * 5000)[2]


def test_the_bundle_is_the_named_one_or_that_of_the_environment_or_the_one_here(
    run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EDGEADAPT_BUNDLE", raising=False)
    monkeypatch.chdir(tmp_path)
    code, _, err = run("bundle", "list")
    assert code == 2
    assert "there is no ./bundle: name the bundle's folder with --bundle DIR or EDGEADAPT_BUNDLE" in err
    (tmp_path / "bundle").mkdir()
    assert "trust.pem" in run("bundle", "list")[2]
    monkeypatch.setenv("EDGEADAPT_BUNDLE", "elsewhere")
    assert "elsewhere" in run("bundle", "list")[2]
    assert "named" in run("bundle", "list", "--bundle", "named")[2]


def test_what_a_script_of_a_fleet_calls_prints_one_object(
    run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [path for path in LEAVES if not any("--json" in each.opts for each in ALL[path].params)] == []
    monkeypatch.chdir(tmp_path)
    trust = ("--authority", "a/authority.pem")
    pinned = (*trust, "--coordinator", "c/coordinator.pem")
    addresses = ("--enrolment", "a.example:1", "--gateway", "b.example:2")
    for words, keys in (
        (("authority", "init", "a", "--unencrypted"), "authority certificate key"),
        (("coordinator", "init", "c", *trust), "authority key public_key state"),
        (("coordinator", "stop", "c"), "stopped"),
        (("coordinator", "tls-request", "c"), "request"),
        (("authority", "issue", "a", "--request", "c/tls.csr", "--host", "b.example", "--out", "tls.pem"), "days"),
        (("authority", "invite", "a", "--name", "d", "--coordinator", "c/coordinator.pem", *addresses), "token until"),
        (("device", "enrol", "--state", "d", "--name", "d", "--base", "b", *pinned), "authority coordinator request"),
        (("authority", "issue", "a", "--request", "d/request.csr", "--out", "d.pem"), "certificate device file key"),
        (("device", "enrol", "--state", "d", "--certificate", "d.pem"), "device until"),
        (("device", "forget", "--state", "d", "--yes"), "forgotten"),
        (("authority", "revoke", "a", "d"), "list revoked"),
        (("authority", "revoke", "a"), "list number"),
        (("release", "init", "r"), "channels gates public root"),
        (("release", "init", "r", "--set", "accuracy.margin=0.02"), "gates"),
        (("release", "init", "r", "beta"), "channels"),
        (("release", "protect", "r", "beta"), "channel protected"),
        (("release", "renew", "r", "beta", "--new-key"), "discarded role"),
        (("release", "renew", "r"), "until"),
    ):
        code, out, err = run(*words, "--json")
        assert (code, err, out.count("\n")) == (0, "", 1), words
        assert set(keys.split()) <= set(json.loads(out)), words


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            "device enrol --state d --certificate d.pem --base b",
            "--certificate and --revoked are for a state",
        ),
        ("device enrol --state d --renew --base b", "--renew is for a state directory that is there"),
        ("device enrol --state d --renewal a.example:1", "--renewal goes with --renew"),
        ("device enrol --state d", "--base WHERE, or what to install with --certificate FILE"),
        ("authority issue a --public-key d.pub --name d --host h", "--host goes with --request alone"),
        ("release renew r stable", "--new-key goes with one ROLE or CHANNEL"),
        ("release versions fleet 1 2 --sbom", "--sbom is of one VERSION"),
        ("simulate suite . --seeds 2", "is a finished suite"),
    ],
)
def test_options_of_the_two_uses_of_a_command_exclude_each_other(
    words: str, named: str, run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words.split())
    assert (code != 0, out, err.count("\n")) == (True, "", 1)
    assert named in err


def test_a_service_prints_its_log_as_objects_on_standard_output_and_its_end_too(
    run: Run, tmp_path: pathlib.Path
) -> None:
    run("authority", "init", str(tmp_path), "--unencrypted")
    words = ("authority", "serve", str(tmp_path), "--listen", "127.0.0.1:0", "--host", "127.0.0.1", "--json")
    command = [sys.executable, "-m", "edgeadapt", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as service:
        assert service.stdout
        assert service.stderr
        begun = json.loads(service.stdout.readline())
        service.terminate()
        ended, err = json.loads(service.stdout.read()), service.stderr.read()
    assert begun.keys() == {"time", "level", "event", "address"}
    assert (begun["level"], begun["event"]) == ("info", f"listening at {begun['address']}")
    assert ended["time"] >= begun["time"]
    assert (ended["level"], ended["event"], ended["error"]) == ("error", "terminated", "terminated")
    assert (err, service.returncode) == ("", program.TERMINATED)


def test_a_line_of_a_log_has_the_device_and_the_error_where_there_is_one() -> None:
    lines = JsonLines("kitchen")
    record = logging.makeLogRecord({"msg": "%s left", "args": ("hall",), "levelname": "WARNING", "device": "hall"})
    assert json.loads(lines.format(record)).items() >= {"device": "hall", "event": "hall left"}.items()
    failed = logging.makeLogRecord({"msg": "no", "exc_info": (ValueError, ValueError("x"), None), "about": None})
    failed._ray_timestamp_ns = 1  # which Ray attaches to each record, wherever something has imported it
    row = json.loads(lines.format(failed))
    assert row.keys() == {"time", "level", "event", "device", "error"}
    assert (row["device"], row["error"]) == ("kitchen", "ValueError('x')")


def test_a_line_of_another_process_is_relayed_as_it_was_or_as_its_output() -> None:
    record = logging.makeLogRecord({"msg": "50 % done", "levelname": "WARNING", "round": 3, "run": "17"})
    line = JsonLines().format(record)
    again = relayed(line, service="rounds")
    assert json.loads(JsonLines().format(again)) == json.loads(line) | {"service": "rounds"}
    assert again.levelno == logging.WARNING
    times = '{"time": "2026-01-01T00:00:00Z", "level": '
    for other in (
        "INFO: x",
        "[1]",
        "17",
        "{}",
        '{"time": 5, "level": "info", "event": ""}',
        f'{times}"loud", "event": ""}}',
    ):
        row = json.loads(JsonLines().format(relayed(other)))
        assert (row["level"], row["event"], row["text"]) == ("info", "output", other)


def test_a_log_that_nobody_reads_any_more_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        for _ in range(2):
            LogHandler(stream).handle(logging.makeLogRecord({"msg": "connected"}))
    assert capsys.readouterr().err == "edgeadapt: the log cannot be written (Broken pipe): this goes on without\n"


def test_a_wrong_call_is_json_too_where_json_is_asked_for(run: Run) -> None:
    code, out, err = run("audit", "verify", "--json")
    assert code == 2
    assert json.loads(out) == {"error": err.removeprefix("edgeadapt: ").rstrip("\n")}


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (("demo",), "simulations"),
        (("bundle", "add", "--peft", "p", "--bundle", "b", "--key", "key.pem"), "export"),
        (("bundle", "make", "--base", "p", "--bundle", "b", "--key", "key.pem"), "export"),
    ],
)
def test_on_the_bare_install_a_command_names_the_extra_that_it_needs(
    words: Path, extra: str, tmp_path: pathlib.Path, root: pathlib.Path
) -> None:
    without = f"import sys; sys.modules.update(dict.fromkeys({sorted(EXTRAS)}))"
    script = f"{without}; from edgeadapt import program; program.main()"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    key = subprocess.run([sys.executable, "-c", script, "bundle", "key", "key.pem"], cwd=tmp_path, env=environment)
    assert key.returncode == 0
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"edgeadapt: '[\w ]+' needs \w+, which .*: pip install 'edgeadapt\[{extra}\]'\n", done.stderr)


def test_a_shell_completes_commands_without_importing_them(root: pathlib.Path) -> None:
    script = "import sys; from edgeadapt import program\ntry: program.main()\nfinally: print(*sys.modules)"
    asked = {"_EDGEADAPT_COMPLETE": "bash_complete", "COMP_WORDS": "edgeadapt bundle ", "COMP_CWORD": "2"}
    environment = {**os.environ, **asked, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    *lines, modules = done.stdout.splitlines()
    assert lines == [f"plain,{path[1]}" for path in LEAVES if path[0] == "bundle"]
    assert not EXTRAS & set(modules.split())


def test_a_folder_that_hides_a_package_is_named(tmp_path: pathlib.Path, root: pathlib.Path) -> None:
    """As on an install from a wheel: the finder of an editable one looks for each module by itself."""
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "__init__.py").touch()
    wheel = "import sys; sys.meta_path[:] = [each for each in sys.meta_path if 'Editable' not in repr(each)]"
    script = f"{wheel}; from edgeadapt import program; sys.argv = ['edgeadapt', 'device', 'infer']; program.main()"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"edgeadapt: {tmp_path / 'client'} stands in front of edgeadapt's own 'client': ")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file's name is always text")
def test_a_folder_whose_name_is_no_text_is_printed_with_its_bytes_escaped(run: Run, tmp_path: pathlib.Path) -> None:
    code, out, err = run("authority", "init", str(tmp_path / "fleet\udcff"), "--unencrypted")
    assert (code, err) == (0, "")
    assert "fleet\\udcff/authority.pem" in out


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no full disk to write to")
@pytest.mark.parametrize(
    "words", [["base", "show"], ["bundle", "list", "--bundle", "nowhere"]], ids=["result", "error"]
)
def test_an_output_that_cannot_be_written_is_one_line(words: list[str]) -> None:
    with pathlib.Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "edgeadapt", *words, "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode != 0
    assert done.stderr.startswith("edgeadapt: ")
    assert done.stderr.count("\n") == 1, done.stderr


FULL = (errno.ENOSPC, os.strerror(errno.ENOSPC))
READ_ONLY = (errno.EROFS, os.strerror(errno.EROFS), "/mnt/fleet")


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(*FULL, "runs/demo"), ("No space left on device: runs/demo: free some space there",)),
        (OSError(*FULL, "read", None, "written"), ("device: written: free",)),
        (OSError(*FULL), ("free some space where", tempfile.gettempdir())),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "home"), ("home: ", "quota there")),
        (OSError(*READ_ONLY), ("/mnt/fleet: name a place",)),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "signing.pem"), ("signing.pem: let this user",)),
    ],
)
def test_what_the_system_refuses_names_the_file_and_the_remedy(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: OSError, named: tuple[str, ...]
) -> None:
    def fail(**_options: object) -> None:
        raise error

    monkeypatch.setattr(program, "cli", fail)
    code, out, err = run("demo")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert all(each in err for each in named), err


INTERRUPTED = """
import os, signal, sys
from coordinator.services import deployment
from edgeadapt import program

def up(folder, report, **how):
    os.kill(os.getpid(), signal.SIGINT)
    sum(range(10))

deployment.up = up
program.main()
"""


def test_ctrl_c_leaves_objects_alone_in_the_output_of_services() -> None:
    command = [sys.executable, "-c", INTERRUPTED, "coordinator", "up", "fleet", "--json"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=50)
    assert [json.loads(line)["error"] for line in ended.stdout.splitlines()] == ["interrupted"]
    assert ended.returncode == 130


def test_too_little_memory_is_said_in_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(**_options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(program, "cli", exhausted)
    assert run("audit") == (1, "", "edgeadapt: this machine does not have enough memory\n")


def test_who_terminates_a_command_reads_so_also_while_a_library_is_kept_quiet(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quietly(**_options: object) -> None:
        with redirect_stderr(io.StringIO()):
            program._interrupt(signal.SIGTERM, None)

    monkeypatch.setattr(program, "cli", quietly)
    assert run("demo") == (143, "", "edgeadapt: terminated\n")


CALLBACK = """
import os, time
from edgeadapt import program

once = program._send_again

def busy(number):  # as on a busy machine: the signal comes again while the first one is dealt with
    program._send_again = once
    once(number)
    time.sleep({seconds})

class Finalizer:
    def __del__(self):
        os.kill(os.getpid(), {number})
        sum(range(10))  # the handler runs here, and Python drops what it raises

def command(**options):
    Finalizer()
    for _ in range(600): time.sleep(0.1)  # Python starts no handler within a call, if the signal came just before it

program._send_again = busy
program.cli = command
program.main()
"""


SIGNALS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]


@pytest.mark.parametrize("seconds", [0, 0.05])
@pytest.mark.parametrize(("number", "code", "line"), SIGNALS)
def test_a_signal_during_a_callback_is_not_lost(number: int, code: int, line: str, seconds: float) -> None:
    script = CALLBACK.format(number=int(number), seconds=seconds)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", f"edgeadapt: {line}\n")


IMPORTED = """
import os, time
os.kill(os.getpid(), {number})
sum(range(10))  # here a handler runs
ended = time.monotonic() + 0.2  # in which the signal comes again and again
while time.monotonic() < ended: time.sleep(0.01)
print("imported", flush=True)
"""
IMPORTING = """
import time
from edgeadapt import program

def command(**options):
    import slow
    for _ in range(600): time.sleep(0.1)  # Python starts no handler within a call, if the signal came just before it

program.cli = command
program.main()
"""


def test_the_tests_of_ctrl_c_pass_in_the_background_of_a_shell() -> None:
    """There a process ignores SIGINT from its start, as with nohup."""
    one = f"{__file__}::{test_a_signal_during_an_import_waits_for_its_end.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", one]
    shell = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *command]
    ended = subprocess.run(shell, cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True, timeout=150)
    assert (ended.returncode, "2 passed" in ended.stdout) == (0, True), ended.stdout


@pytest.mark.parametrize(("number", "code", "line"), SIGNALS)
def test_a_signal_during_an_import_waits_for_its_end(tmp_path: pathlib.Path, number: int, code: int, line: str) -> None:
    (tmp_path / "slow.py").write_text(IMPORTED.format(number=int(number)))
    ended = subprocess.run([sys.executable, "-c", IMPORTING], cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "imported\n", f"edgeadapt: {line}\n")
