"""What installed packages add to edgeadapt, by name: an entry point announces each (docs/how-to/extend.md). A plan, a
manifest and settings have names only. A package is imported when one of its names is used."""

from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from aggregation.errors import ConfigError

T = TypeVar("T")


class Extensions(Generic[T]):
    """Ours and those of others, in one group of entry points.

    >>> "median" in Extensions("edgeadapt.tests", "test", "test", {"mean": sum}).names()
    False
    """

    def __init__(
        self,
        group: str,
        what: str,
        about: str,
        ours: Mapping[str, T],
        check: Callable[[str, T], object] = lambda name, item: None,
    ) -> None:
        """``what`` names one of them in errors, which are ``about`` a key. ``check`` raises ConfigError for one of
        others that cannot be used."""
        self.group, self.what, self._about, self._check = group, what, about, check
        self._known = dict(ours)
        self._ours = frozenset(ours)

    def names(self) -> list[str]:
        """List ours, those that were added, and those that are installed."""
        return [*self._known, *sorted({point.name for point in self._points()} - {*self._known})]

    def require(self, name: str) -> str:
        """Check that there is one of this name, without importing it, and return the name. Raises ValueError, as
        pydantic's validators do."""
        if name not in self._known and not self._points(name):
            raise ValueError(f"there is no {self.what} {name!r}: take one of {', '.join(self.names())}, or install it")
        return name

    def find(self, name: str) -> T:
        """Return one by its name. Raises ConfigError: it is not known, cannot be imported or used, or two packages have
        one of this name."""
        if name not in self._known:
            try:
                self.require(name)
            except ValueError as error:
                raise ConfigError(str(error), about=self._about) from None
            self._known[name] = self._load(name)
        return self._known[name]

    def add(self, name: str, item: T) -> str:
        """Let this process know one that no package has, in place of a previous one; return its name. Raises
        ConfigError: it is the name of one of ours, or it cannot be used."""
        if self._known.get(name) is item:
            return name
        if name in self._ours:
            raise ConfigError(f"{name!r} is a {self.what} of edgeadapt: choose another name", about=self._about)
        self._check(name, item)
        self._known[name] = item
        return name

    def _load(self, name: str) -> T:
        first, *others = self._points(name)
        if others:
            packages = " and ".join(sorted({point.value for point in (first, *others)}))
            raise ConfigError(f"{packages} both give a {self.what} {name!r}: uninstall one", about=self._about)
        try:
            item: T = first.load()
        except Exception as error:  # of a package of others
            reason = f"the {self.what} {name!r} ({first.value}) cannot be imported: {error}"
            raise ConfigError(reason, about=self._about) from error
        self._check(name, item)
        return item

    def _points(self, name: str | None = None) -> list[EntryPoint]:
        points = {(point.name, point.value): point for point in entry_points(group=self.group)}
        return [point for point in points.values() if name in (None, point.name)]
