"""What must not appear in the code: what unpickles, evaluates, draws from a global generator, or leaves out masks."""

import ast
from collections.abc import Iterator
from typing import Any

UNSAFE_IMPORTS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "torch.save", "np.load", "numpy.load"}
GENERATORS = {"BitGenerator", "Generator", "PCG64", "Philox", "SeedSequence", "default_rng"}
GLOBAL_SEEDS = {"random.seed", "torch.manual_seed", "torch.random.manual_seed", "torch.seed", "torch.cuda.manual_seed"}
GLOBAL_SEEDS |= {"torch.cuda.manual_seed_all", "set_seed", "transformers.set_seed", "enable_full_determinism"}
PARTIES = {"Coordinator", "Device", "IdentityKey", "PublicKey", "Recovery", "Root"}  # what masks, signs and verifies
CLOCKS = {"monotonic", "now", "perf_counter", "time", "today", "utcnow"}


def bases(tree: ast.Module) -> Iterator[str]:
    """The names of all classes from which others are derived."""
    classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    yield from (last(ast.unparse(base)) for each in classes for base in each.bases)


def test_nothing_unpickles_or_evaluates(all_sources: Any) -> None:
    found = [f"{source.path}:{line}: {name}" for source in all_sources for line, name in unsafe(source.tree)]
    assert not found


def test_nothing_seeds_or_draws_from_a_global_generator(all_sources: Any) -> None:
    found = [f"{source.path}:{line}: {name}" for source in all_sources for line, name in global_randomness(source.tree)]
    assert not found


def test_the_protocol_core_reads_no_clock(sources: Any) -> None:
    core = [source for source in sources if source.path.startswith("aggregation/")]
    assert core
    found = [f"{s.path}:{line}: {name}" for s in core for line, name in calls(s.tree) if last(name) in CLOCKS]
    assert not found


def test_only_simulations_have_parties_without_masks(sources: Any) -> None:
    found = {source.path for source in sources for name in bases(source.tree) if name in PARTIES}
    assert found == {"simulations/engine/plain.py"}


def unsafe(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines that could run code hidden in data."""
    yield from ((line, name) for line, name in imports(tree) if name.partition(".")[0] in UNSAFE_IMPORTS)
    weights = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call) and _only_weights(node)}
    yield from ((line, name) for line, name in calls(tree) if name in UNSAFE_CALLS and line not in weights)
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield node.value.lineno, "allow_pickle"


def _only_weights(call: ast.Call) -> bool:
    stated = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    return ast.unparse(call.func) == "torch.load" and stated.get("weights_only") == "True"


def global_randomness(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines that seed, or draw from, a generator that nobody passed."""
    yield from ((line, name) for line, name in calls(tree) if name in GLOBAL_SEEDS)
    for line, name in [*calls(tree), *imports(tree)]:
        _, found, member = name.partition("np.random." if name.startswith("np.") else "numpy.random.")
        if found and member.partition(".")[0] not in GENERATORS:
            yield line, name


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Dotted names that the module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module or ''}.{alias.name}") for alias in node.names)


def calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Dotted names that the module calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := dotted(node.func)):
            yield node.lineno, name


def dotted(node: ast.AST) -> str:
    """``a.b.c`` for such an expression, else nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (front := dotted(node.value)):
        return f"{front}.{node.attr}"
    return ""


def last(name: str) -> str:
    return name.rpartition(".")[2]
