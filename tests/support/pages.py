"""Read a page as its elements."""

from html.parser import HTMLParser

VOID = {"meta", "path", "use", "rect", "br"}


class PageOutline(HTMLParser):
    """Collects elements and attributes, and asserts that elements are closed in the reverse order of their opening."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def outline(html: str) -> PageOutline:
    """The elements of a page, all of which are closed."""
    parser = PageOutline()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser
