import io

import pytest

from export.cli.waiting import waiting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_one_plain_line() -> None:
    out = io.StringIO()
    with waiting("exporting", out):
        assert out.getvalue() == "exporting\n"
    assert out.getvalue() == "exporting\n"


def test_a_terminal_sees_the_seconds_on_one_line_that_ends() -> None:
    out = Terminal()
    with waiting("exporting", out):
        pass
    assert out.getvalue().startswith("\rexporting … 0 s")
    assert out.getvalue().count("\n") == 1
    assert out.getvalue().endswith("\n")


def test_what_fails_while_waiting_is_said_on_a_line_of_its_own() -> None:
    out = Terminal()
    with pytest.raises(ValueError, match="wrong"), waiting("exporting", out):
        raise ValueError("wrong")
    assert out.getvalue().endswith("\n")
