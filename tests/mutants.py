"""Faults put into the formulas of the losses, one at a time, and the tests that must notice them.

`python -m tests.mutants` reads keys of mutants, one in a line ('' is the code as it is), and runs
the tests of the losses with each in a process of its own, forked when everything else is loaded.
"""

from __future__ import annotations

import ast
import importlib
import io
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TESTS = [
    f"tests/test_{n}.py" for n in ("oracles", "edges", "losses", "edge_reasoning", "baselines")
]
"""Run one after the other until one fails."""
FIRST = {
    "lesionkd_core.edges": "tests/test_edges.py",
    "lesionkd_core.losses.baselines": "tests/test_baselines.py",
    "lesionkd_core.losses.edge_reasoning": "tests/test_edge_reasoning.py",
}
"""Where a fault is most likely noticed; otherwise in test_losses."""

SIGNS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
COMPARISONS = {
    ast.Gt: (ast.GtE, ast.Lt),
    ast.Lt: (ast.LtE, ast.Gt),
    ast.GtE: (ast.Gt,),
    ast.LtE: (ast.Lt,),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPPOSITES = [
    ("amax", "amin"),
    ("clamp_min", "clamp_max"),
    ("maximum", "minimum"),
    ("mean", "sum"),
    ("any", "all"),
    ("zeros", "ones"),
    ("zeros_like", "ones_like"),
    ("new_zeros", "new_ones"),
]
OTHER = (
    dict(OPPOSITES)
    | {b: a for a, b in OPPOSITES}
    | {"clamp_min_": "clamp_max_", "rsqrt": "sqrt", "floor": "ceil", "log_softmax": "softmax"}
)
WRAPPERS = {
    "detach",
    "abs",
    "square",
    "relu",
    "sigmoid",
    "clamp",
    "clamp_min",
    "clamp_max",
    "clamp_min_",
    "floor",
    "float",
    "double",
    "exp",
    "rsqrt",
    "normalize",
    "requires_grad_",
    "_precise",
    "clone",
}
SHAPES = {
    "flatten",
    "unflatten",
    "transpose",
    "permute",
    "squeeze",
    "unsqueeze",
    "view",
    "expand",
}  # another number only crashes
TEACHERS = ("teacher", "target", "masks")
UNTOUCHED = {
    "annotation",
    "returns",
    "decorator_list",
    "exc",
}  # what is computed by none of them: types, messages of errors


class Mutant(NamedTuple):
    """One fault: where and what, its kind, its module, and the module's whole source with it."""

    key: str
    kind: str
    module: str
    source: str


def modules() -> dict[str, Path]:
    """Name -> file of what is mutated."""
    files = [
        *sorted((ROOT / "lesionkd_core" / "losses").glob("*.py")),
        ROOT / "lesionkd_core" / "edges.py",
    ]
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }


def _constants(node: ast.Constant) -> Iterator[tuple[str, ast.expr]]:
    value = node.value
    if isinstance(value, bool):
        yield "constant", ast.Constant(not value)
    elif isinstance(value, int):
        yield "constant", ast.Constant(value + 1)
    elif isinstance(value, float):
        yield (
            "constant",
            ast.Constant(value * (1.2 if value >= 1e-3 else 1e6) or 1.0),
        )  # guards are small: a little more of them is nothing


def _operators(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in SIGNS:
        op = SIGNS[type(node.op)]()
        yield (
            "sign",
            ast.BinOp(node.left, op, node.right)
            if isinstance(node, ast.BinOp)
            else ast.AugAssign(node.target, op, node.value),
        )
    if isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
        yield "dropped", node.left
        if not isinstance(node.op, ast.Pow):
            yield "dropped", node.right
    if isinstance(node, ast.Compare):
        for op in COMPARISONS.get(type(node.ops[0]), ()):
            yield "comparison", ast.Compare(node.left, [op()], node.comparators)
    if isinstance(node, ast.BoolOp):
        yield (
            "logic",
            ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values),
        )
    if isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield "dropped", node.operand
    if (
        isinstance(node, (ast.If, ast.IfExp))
        and not isinstance(node.test, ast.Compare)
        and "TYPE_CHECKING" not in ast.unparse(node.test)
    ):
        yield "logic", type(node)(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)


def _swappable(pair: list[ast.expr]) -> bool:
    """Student's and teacher's side of the same, or a prediction and what it should be."""
    plain = len(pair) == 2 and all(
        isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)) for node in pair
    )
    return plain and sum(any(word in ast.unparse(node) for word in TEACHERS) for node in pair) == 1


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _calls(node: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    name = _name(node)
    if name in OTHER and isinstance(node.func, ast.Attribute):
        yield (
            "extremum",
            ast.Call(
                ast.Attribute(node.func.value, OTHER[name], ast.Load()), node.args, node.keywords
            ),
        )
    if name in WRAPPERS:
        of_module = (
            isinstance(node.func, ast.Name)
            or isinstance(node.func.value, ast.Name)
            and node.func.value.id in ("F", "torch")
        )
        yield "unwrapped", node.args[0] if of_module else node.func.value
    if _swappable(node.args[:2]):
        yield (
            "swapped",
            ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords),
        )


def alternatives(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What may replace a node: (kind of fault, other node)."""
    yield from _operators(node)
    if isinstance(node, ast.Constant):
        yield from _constants(node)
    elif isinstance(node, ast.Call):
        yield from _calls(node)
    elif isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load) and _swappable(node.elts):
        yield "swapped", ast.Tuple(node.elts[::-1], ast.Load())
    elif isinstance(node, ast.With) and "no_grad" in ast.unparse(node.items[0]):
        yield "unwrapped", ast.If(ast.Constant(True), node.body, [])
    elif (
        isinstance(node, ast.AugAssign)
        or isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and "super()" not in ast.unparse(node)
    ):
        yield "dropped", ast.Pass()


def _places(node: ast.AST, above: tuple = (), scope: str = "") -> Iterator[tuple]:
    """Every computed node as (owner, field, index or None, node, nodes above, function)."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        scope = f"{scope}.{node.name}"
    for field, value in ast.iter_fields(node):
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            shape = isinstance(node, ast.Call) and _name(node) in SHAPES and field == "args"
            table = isinstance(node, ast.Module) and isinstance(child, ast.Assign)
            skipped = field in UNTOUCHED or shape or table
            if isinstance(child, ast.AST) and not skipped:
                yield node, field, index, child, (*above, node), scope
                yield from _places(child, (*above, node), scope)


def _put(owner: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(owner, field, node)
    else:
        getattr(owner, field)[index] = node


def _around(child: ast.AST, above: tuple) -> ast.AST:
    """The smallest expression that says where: one number would not."""
    for node in (child, *reversed(above)):
        if (
            isinstance(node, (ast.stmt, ast.comprehension, ast.arguments))
            or len(ast.unparse(node)) >= 24
        ):
            return (
                child if isinstance(node, (ast.arguments, ast.FunctionDef, ast.ClassDef)) else node
            )
    return child


def _change(before: str, after: str) -> str:
    """Both, as far as they differ, with a little of what is around."""
    before, after = before.splitlines()[0], after.splitlines()[0]
    same = len(os.path.commonprefix([before, after]))
    behind = len(os.path.commonprefix([before[same:][::-1], after[same:][::-1]]))
    start, rest = max(same - 32, 0), max(behind - 16, 0)
    return " -> ".join(
        "…" * (start > 0) + text[start : len(text) - rest] + "…" * (rest > 0)
        for text in (before, after)
    )


def mutants_of(module: str, source: str) -> Iterator[Mutant]:
    """Every fault of one module; keys name function, code before and after, and number."""
    tree, seen = ast.parse(source), Counter()
    for owner, field, index, child, above, scope in _places(tree):
        whole = next(
            (node for node in (child, *reversed(above)) if isinstance(node, ast.stmt)), child
        )
        around = (
            whole
            if isinstance(whole, (ast.AugAssign, ast.Expr)) or whole is child
            else _around(child, above)
        )
        before = ast.unparse(around)
        for kind, other in alternatives(child):
            _put(owner, field, index, other)
            after = ast.unparse(other if around is child else around)
            key = f"{module.removeprefix('lesionkd_core.')}{scope}: {_change(before, after)}"
            seen[key] += 1
            yield Mutant(
                key + (f" #{seen[key]}" if seen[key] > 1 else ""), kind, module, ast.unparse(tree)
            )
            _put(owner, field, index, child)


def mutants() -> dict[str, Mutant]:
    """All of them by key."""
    return {
        mutant.key: mutant
        for module, file in modules().items()
        for mutant in mutants_of(module, file.read_text())
    }


def _warm() -> None:
    """Load what tests import, then forget the project, so that a child imports little."""
    importlib.import_module("monai.losses")
    torch.set_num_threads(1)
    with redirect_stdout(io.StringIO()):
        assert pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *TESTS]) == 0
    for name in [name for name in sys.modules if name.startswith(("lesionkd_core", "tests"))]:
        del sys.modules[name]


def _child(mutant: Mutant | None) -> None:
    """Import the project with the mutant in it, run the tests and end with pytest's status."""
    resource.setrlimit(resource.RLIMIT_CPU, (300, 300))  # a loop without an end is noticed too
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    tests = TESTS
    if mutant:
        as_it_is = SourceFileLoader.get_code
        SourceFileLoader.get_code = lambda self, name: (
            compile(mutant.source, "<mutant>", "exec")
            if name == mutant.module
            else as_it_is(self, name)
        )
        tests = sorted(TESTS, key=lambda test: test != FIRST.get(mutant.module, TESTS[2]))
    os._exit(
        next(
            (
                code
                for test in tests
                if (code := pytest.main(["-x", "-q", "-p", "no:cacheprovider", test]))
            ),
            0,
        )
    )


def _run(keys: list[str]) -> None:
    known, waiting, running = mutants(), list(keys), {}
    _warm()
    while waiting or running:
        if waiting and len(running) < os.cpu_count():
            key = waiting.pop(0)
            pid = os.fork()
            if not pid:
                _child(known[key] if key else None)
            running[pid] = key
            continue
        pid, status, spent = os.wait4(-1, 0)
        code = os.waitstatus_to_exitcode(status)
        verdict = (
            "survived" if code == 0 else "killed" if code in (1, 2) or code < 0 else f"error {code}"
        )
        print(f"{verdict}\t{spent.ru_utime + spent.ru_stime:.1f}\t{running.pop(pid)}", flush=True)


def verdicts(keys: list[str]) -> dict[str, str]:
    """Run them in a process of its own: {key: 'killed', 'survived' or what went wrong}."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("COVERAGE_", "LESIONKD_TEST_RUNS"))
    }
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.mutants"]
    done = subprocess.run(
        command,
        input="\n".join(keys) + "\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        key: verdict for verdict, _, key in (line.split("\t") for line in done.stdout.splitlines())
    }


if __name__ == "__main__":
    _run(sys.stdin.read().split("\n")[:-1])
