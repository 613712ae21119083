"""Who may import whom, and that each role's extra installs all that the role imports."""

import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest

PARTS = ("aggregation", "client", "coordinator", "edgeadapt", "export", "simulations")
DEVICE = ("client.cli", "client.cli.bundles", "client.cli.infer", "client.inference", "client.learning")
ENROLMENT = ("client.cli.node", "client.node.statedir", "edgeadapt.cli.authority", "edgeadapt.authority.store")
AUDITOR = ("edgeadapt.cli.audit", "edgeadapt.auditing.transcripts")
TRAINING = ("edgeadapt.bases.traininggraph", "client.training.graphengine")
COMMANDS = ("promotion", "versions")
GOVERNANCE = ("edgeadapt.promotion", "edgeadapt.releases", *(f"edgeadapt.cli.{name}" for name in COMMANDS))
COMPARISON = ("edgeadapt.cli.versions", "edgeadapt.releases.lineage", "edgeadapt.releases.lineage")
DISTRIBUTIONS = {  # import package → distribution of another name
    "cyclonedx": "cyclonedx-python-lib",
    "google": "protobuf",
    "grpc": "grpcio",
    "packageurl": "packageurl-python",
    "PIL": "pillow",
}
ABSENT_ON_A_DEVICE = {"flwr", "fsspec", "onnx", "peft", "safetensors", "sqlalchemy", "torch", "transformers"}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    built = grimp.build_graph(*PARTS, include_external_packages=True, cache_dir=None)
    # Only for a registry in a database or a bucket, which takes the extra of either.
    built.remove_import(importer="edgeadapt.formats.registryreader", imported="edgeadapt.formats.registrystores")
    built.remove_import(importer="edgeadapt.interface.audits", imported="coordinator.statedir")
    built.remove_import(importer="edgeadapt.promotion.evaluations", imported="coordinator.statedir")
    built.remove_import(importer="edgeadapt.commandline", imported="rich")  # a spinner, in commands with an extra
    built.remove_import(importer="edgeadapt.cli.versions", imported="edgeadapt.releases.sbom")  # with --sbom
    built.remove_import(importer="export.addition", imported="cyclonedx")  # a license is checked by it if it is there
    # Only for traces, which take the extra of that name.
    built.remove_import(importer="edgeadapt.traceexport", imported="opentelemetry")
    built.remove_import(importer="edgeadapt.traces", imported="opentelemetry")
    return built


def test_a_device_that_only_answers_loads_no_training_framework(root: Path) -> None:
    # The import graph sees what is written; this sees what happens, in a fresh interpreter.
    loaded = "print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    script = f"import sys, edgeadapt.program, {', '.join(DEVICE)}; {loaded}"
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "client" in loaded
    assert not loaded & ABSENT_ON_A_DEVICE


def test_a_device_that_takes_part_with_a_training_graph_loads_no_training_framework(root: Path) -> None:
    script = f"import sys, client.node.app, {', '.join(TRAINING)}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert {"client", "onnxruntime", "flwr"} <= loaded
    assert not loaded & (ABSENT_ON_A_DEVICE - {"flwr", "safetensors"}) - {"sqlalchemy"}  # which flwr may load


def test_the_command_line_loads_no_part_before_it_is_asked_to(root: Path) -> None:
    script = "import sys, edgeadapt.program; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "aggregation.errors" in loaded
    assert not loaded & {"numpy", "client", "coordinator", "export", "simulations", *ABSENT_ON_A_DEVICE}


@pytest.mark.parametrize(
    ("modules", "extra"),
    [
        (DEVICE, None),
        (ENROLMENT, None),
        (AUDITOR, None),
        (TRAINING, None),
        (("client",), "train serve"),
        (("client.inference.server", "client.inference.grpcserver"), "serve"),
        (("coordinator",), "coordinator"),
        (("export",), "export"),
        (COMPARISON, None),
        (("simulations",), "simulations"),
        (GOVERNANCE, "governance"),
    ],
    ids=[
        "bare install",
        "enrolment",
        "audit",
        "training graph",
        "train and serve",
        "serve",
        "coordinator",
        "export",
        "comparison of versions",
        "simulations",
        "governance",
    ],
)
def test_each_roles_extra_installs_what_the_role_imports(
    graph: grimp.ImportGraph, root: Path, modules: tuple[str, ...], extra: str | None
) -> None:
    needed: set[str] = set()
    for module in modules:
        needed |= graph.find_upstream_modules(module, as_package=extra is not None)
    third_party = {name.partition(".")[0] for name in needed} - {*PARTS} - set(sys.stdlib_module_names)
    assert third_party
    needed = {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in third_party}
    declared = (_declared(root, one) for one in (extra.split() if extra else [None]))
    assert needed - set().union(*declared) == set()


def _declared(root: Path, extra: str | None) -> set[str]:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = list(project["dependencies"]) + list(extras[extra] if extra else [])
    others = {"simulations": ("train", "coordinator", "export"), "governance": ("export",)}
    lines += [line for other in others.get(extra or "", ()) for line in extras[other]]
    return {line.partition(">")[0].partition("=")[0].partition("[")[0].strip().lower() for line in lines}
