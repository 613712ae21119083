"""The memory of tenants: N adapters on one base in one process, and two processes that map the same base.

It is measured from outside, in processes that only load and answer: Linux sums a process's pages in
``/proc/PID/smaps_rollup``. ``pss`` counts a page that k processes map as 1/k in each, ``private`` counts pages of one
process only, so N processes take about ``shared + N x private``.

An adapter of the bundle is copied under N names, each signed by a key that is made for the measurement.
"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError
from aggregation.pki.identity import IdentityKey
from client.inference.library import Composition, Library
from edgeadapt.formats.bundle import ADAPTERS, BASE, BASE_MANIFEST, TRUST, WEIGHTS, adapter_path, manifest_path
from edgeadapt.formats.manifest import BaseManifest

COUNTS = (1, 10, 100, 1000)
TEXT = "turn on the kitchen lights"
UNLIMITED = 2**40  # bytes of loaded adapters
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pages:
    """Sums over the pages of one process, in bytes."""

    rss: int
    pss: int
    shared: int
    private: int

    @classmethod
    def of(cls, process: int) -> "Pages":
        """Read the sums of a running process. Raises ConfigError: the system is not Linux."""
        return cls._summed(_read(process, "smaps_rollup")[1:])

    @classmethod
    def mapping(cls, process: int, file: str) -> "Pages":
        """The sums over the pages that map a file of the name ``file``, zero if there are none. Raises as ``of``."""
        found, rows, inside = [], _read(process, "smaps"), False
        for row in rows:
            if not row.partition(" ")[0].endswith(":"):  # a mapping begins: addresses, …, path
                inside = row.rpartition("/")[2] == file
            elif inside:
                found.append(row)
        return cls._summed(found)

    @classmethod
    def _summed(cls, rows: Sequence[str]) -> "Pages":
        size: Counter[str] = Counter()
        for row in rows:
            key, _, value = row.partition(":")
            if value.endswith(" kB"):
                size[key] += 1024 * int(value.split()[0])
        shared = size["Shared_Clean"] + size["Shared_Dirty"]
        return cls(size["Rss"], size["Pss"], shared, size["Private_Clean"] + size["Private_Dirty"])


def _read(process: int, name: str) -> list[str]:
    try:
        return Path(f"/proc/{process}/{name}").read_text().splitlines()
    except FileNotFoundError as error:
        reason = "memory can be measured on Linux only, which reports the pages that processes share"
        raise ConfigError(reason, about=name) from error


def measure(
    bundle: Path, trust: Path | None = None, counts: Sequence[int] = COUNTS, name: str | None = None
) -> dict[str, Any]:
    """Measure the memory of processes that hold as many copies of one adapter as ``counts`` says.

    Returns, in bytes: ``tenants``: N → pages of one process with N adapters loaded. ``processes``: the pages of each of
    two processes with one adapter. ``mapped``: those of them that map the base's file of weights; the other weights are
    copies that ONNX Runtime made. ``bytes_per_tenant``: growth of resident memory per adapter between the smallest and
    the largest count, null with one count. ``adapter_bytes``: the adapter's tensors in float32. ``base_bytes``: all
    files of the base.
    """
    library = Library.open(bundle, trust)
    name = name or library.default()
    adapter = library.load(Composition.of(name))
    with with_tenants(library, name, max(counts)) as copy:
        tenants = {str(n): _while_running(copy, n, 1, Pages.of)[0] for n in counts}
        processes = _while_running(copy, 1, 2, lambda process: (Pages.of(process), Pages.mapping(process, WEIGHTS)))
    fewest, most = min(counts), max(counts)
    # Not ``private``: which pages are shared changes with other processes of the machine.
    growth = tenants[str(most)].rss - tenants[str(fewest)].rss
    return {
        "tenants": {n: asdict(pages) for n, pages in tenants.items()},
        "processes": [asdict(pages) for pages, _ in processes],
        "mapped": [asdict(mapped) for _, mapped in processes],
        "bytes_per_tenant": round(growth / (most - fewest)) if most > fewest else None,
        "adapter_bytes": adapter.nbytes,
        "base_bytes": sum(file.path.stat().st_size for file in library.base.hashed),
    }


@contextmanager
def with_tenants(library: Library, name: str, count: int) -> Iterator[Path]:
    """A temporary bundle with the same base and ``count`` copies of an adapter, ``tenant-0`` and so on."""
    key = IdentityKey.generate(SystemEntropy())
    manifest = library.trust.bundle.adapter_manifest(name)
    base: BaseManifest = library.manifest
    blob = (library.bundle / adapter_path(name)).read_bytes()
    with TemporaryDirectory(prefix="edgeadapt-tenants-") as folder:
        bundle = Path(folder) / "bundle"
        for part in (BASE, ADAPTERS):
            (bundle / part).mkdir(parents=True)
        for file in base.files:
            _link((library.base.folder / file).resolve(), bundle / BASE / file)
        (bundle / BASE_MANIFEST).write_bytes(base.sign(key))
        (bundle.parent / TRUST).write_bytes(key.public.to_pem())
        for number in range(count):
            tenant = replace(manifest, name=f"tenant-{number}")
            (bundle / manifest_path(tenant.name)).write_bytes(tenant.sign(key))
            (bundle / adapter_path(tenant.name)).write_bytes(blob)
        yield bundle


def _link(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:  # another file system; both processes map the same copy
        name.write_bytes(file.read_bytes())


def _while_running(bundle: Path, tenants: int, processes: int, read: Callable[[int], T]) -> list[T]:
    """Run ``processes`` processes at the same time, each with ``tenants`` adapters, and ``read`` what each has."""
    command = [sys.executable, "-m", __name__, str(bundle), str(tenants)]
    with ExitStack() as stack:
        running = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))  # noqa: S603
            for _ in range(processes)
        ]
        for process in running:
            assert process.stdout is not None  # noqa: S101
            if process.stdout.readline() != "ready\n":
                reason = f"a process with {tenants} adapters has ended; its own message is above"
                raise ConfigError(reason, about="tenants")
        found = [read(process.pid) for process in running]
        for process in running:
            process.communicate()
    return found


def _tenants(bundle: Path, count: int) -> Any:
    """A session or generator that holds a base with ``count`` adapters, each of which was active once."""
    library = Library.open(bundle, None)
    loaded: dict[str, Any] = {"loaded": count + 1, "loaded_bytes": UNLIMITED}
    if library.manifest.task == "text-classification":
        from client.inference.session import ClassificationSession

        session = ClassificationSession.open(bundle, **loaded)
        for number in range(count):
            session.classify([TEXT], f"tenant-{number}")
        return session
    from client.inference.generate import Generator
    from client.inference.text import SamplingParams

    generator = Generator.of(library, **loaded)
    for number in range(count):
        list(generator.complete(TEXT, SamplingParams(max_tokens=2), f"tenant-{number}"))
    return generator


if __name__ == "__main__":
    held = _tenants(Path(sys.argv[1]), int(sys.argv[2]))
    print("ready", flush=True)
    sys.stdin.read()
