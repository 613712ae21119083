"""Cutting a stream of text at stop strings, without letting out the beginning of one."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Stops:
    """Feed pieces, emit what comes back.

    Law: what ``feed`` and ``rest`` return, joined, is the text fed up to the first stop string, whatever the pieces.
    """

    strings: tuple[str, ...]  # none of them empty
    hit: str | None = None  # the stop string that ended the text
    _held: str = field(default="", repr=False)  # may be the beginning of a stop string

    def feed(self, piece: str) -> str:
        """What of the text so far is sure to come before any stop string. Nothing more once one was hit."""
        if self.hit is not None:
            return ""
        text = self._held + piece
        found = [(at, string) for string in self.strings if (at := text.find(string)) >= 0]
        if found:
            end, self.hit = min(found)
            self._held = ""
        else:
            end = len(text) - self._overlap(text)
            self._held = text[end:]
        return text[:end]

    def rest(self) -> str:
        """What was held back, when no more comes."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, text: str) -> int:
        """The length of the longest end of ``text`` that begins a stop string."""
        longest = max((len(string) for string in self.strings), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((n for n in sizes if any(s.startswith(text[-n:]) for s in self.strings)), 0)
