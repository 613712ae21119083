"""A file of a stranger is read in time linear in its length, and as a browser reads it."""

import pytest

from edgeadapt.formats.passages import split
from tests.support.growth import LINEAR, growth, repeated

LIMIT = 2**18  # characters: enough to see how the time grows
MARKDOWN = {
    "a heading of spaces": lambda size: f"#{' ' * (size // 2)}x #{' ' * (size // 2)}x",
    "a heading of signs": repeated("#", "# x"),
    "a heading of signs and spaces": repeated("# ", "# x ", "x"),
    "spaces": repeated(" ", "", "#"),
    "tabs after a sign": repeated("\t", "#", "x"),
    "headings": repeated("# a\n"),
    "other white space": repeated("\x1c\x85\u3000", "#", "x#"),
}
UNITS = (
    *(
        "<",
        "</",
        "<!",
        "<?",
        "<!-",
        "<!--",
        "<!--x-->",
        "<!-- -",
        "<![CDATA[",
        "<![CDATA[]",
        "<![if ",
        "<!DOCTYPE [",
        "<!>",
    ),
    *(
        "<a",
        "<a ",
        "<a>",
        "<a b",
        "<a b=",
        "<a b='",
        '<a b="',
        "<a b='\" ",
        "<a b=c ",
        "<a/",
        "<a / ",
        "<a =",
        "</a",
        "</a ",
    ),
    *(
        "<script>",
        "<script><",
        "</script",
        "<script></scr",
        "<style></",
        "<title>",
        "<nav>",
        "</nav>",
        "<h1>",
        "<h1",
        "<p>",
    ),
    *(
        "&",
        "&a",
        "&amp",
        "&#",
        "&#1",
        "&#x",
        "&#xf",
        "&#9999999",
        "=",
        "= ",
        "='",
        "'",
        '"',
        "-",
        "--",
        "]]",
        "/",
        ">",
        "\n",
    ),
)
BEFORE = ("", "<!--", "<a b='", "<script>")


def linear(name: str, text: str) -> None:
    list(split(name, text.encode()))


@pytest.mark.parametrize("shape", MARKDOWN)
def test_markdown_of_any_shape_is_read_in_linear_time(shape: str) -> None:
    assert growth(lambda text: linear("a.md", text), MARKDOWN[shape], LIMIT) < LINEAR


@pytest.mark.parametrize("before", BEFORE)
def test_a_page_that_does_not_end_its_markup_is_read_in_linear_time(before: str) -> None:
    found = {unit: growth(lambda text: linear("a.html", text), repeated(unit, before), LIMIT) for unit in UNITS}
    assert {unit: power for unit, power in found.items() if power >= LINEAR} == {}


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("a <!-- b", "a"),
        ("a <!--> b", "a b"),
        ("a <!-- <p> --!> b", "a b"),
        ("a <b c='>' d=\"> b", "a"),
        ('a <b c=d">e', "a e"),
        ("a <b c='</p>'>d", "a d"),
        ("a </ b> c </> d", "a c d"),
        ("a <![CDATA[ <p> ]]> b", "a b"),
        ("1 < 2 <3 <", "1 < 2 <3 <"),
        ("a <SCRIPT >b < c</p></Script\n> d", "a d"),
        ("a <script/> b <nav/> c", "a b c"),
        ("a <script> b </scriptx> c", "a"),
        ("a &#" + "9" * 5000 + "; b &#x41; &#65;", "a \ufffd b A A"),
    ],
)
def test_a_page_is_read_as_a_browser_reads_it(page: str, text: str) -> None:
    assert " ".join(one.text for one in split("a.html", page.encode())) == text


@pytest.mark.parametrize(
    ("line", "heading"),
    [
        ("# one #", "one"),
        ("## About C# ##", "About C#"),
        ("# About C#", "About C#"),
        ("   ###### six", "six"),
        ("#", ""),
        ("# #", ""),
        ("######## ", ""),
    ],
)
def test_a_heading_is_without_its_signs(line: str, heading: str) -> None:
    assert [one.heading for one in split("a.md", f"{line}\nword".encode())] == [heading]


@pytest.mark.parametrize("line", ["#one", "####### seven", "    # four spaces", "a # b"])
def test_another_line_is_not_a_heading(line: str) -> None:
    assert [one.heading for one in split("a.md", line.encode())] == [""]
