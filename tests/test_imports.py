"""The shape of the house: imports run one way, `__init__` files only re-export, files stay small."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "natgrad"

# A package imports only from itself and from those before it (docs/architecture.md).
ORDER = (
    "errors",
    "linalg",
    "operators",
    "likelihoods",
    "tape",
    "pde",
    "distributed",
    "metrics",
    "information",
    "steps",
    "optim",
    "natgrad",  # the top-level __init__, which re-exports all that stands before it
    "lab",
    "cli",
    "__main__",
)
TOP = "natgrad"

# Importing natgrad needs none of these: they belong to the extra `lab`, or to the tests.
NOT_CORE = (
    "matplotlib",
    "rich",
    "sklearn",
    "mlxtend",
    "pandas",
    "gymnasium",
    "scipy",
    "safetensors",
    "pytest",
    "hypothesis",
    "beartype",
)

MOST_LINES = 400

FILES = sorted(SOURCE.rglob("*.py"))
INITS = [f for f in FILES if f.name == "__init__.py"]


def name_of(file: Path) -> str:
    """src/natgrad/linalg/kronecker.py → linalg/kronecker.py, as the tests are called."""
    return file.relative_to(SOURCE).as_posix()


def package_of(file: Path) -> str:
    """The part of natgrad that a file belongs to: the first folder below it, or the file itself."""
    first = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    return TOP if first == "__init__" else first


def module_path(file: Path) -> list[str]:
    """The dotted name of the package that a file's relative imports start from."""
    return ["natgrad", *file.relative_to(SOURCE).parts[:-1]]


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Yields (line, part of natgrad) for every import in a file: in functions and under TYPE_CHECKING too."""
    parts = {package_of(f) for f in FILES}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        targets: list[list[str]] = []
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = module_path(file)
            base = here[: len(here) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            # `from natgrad import steps` names a part; `from natgrad import KFAC` names the top level.
            targets = [[*base, alias.name] for alias in node.names] if base == ["natgrad"] else [base]
        for target in targets:
            if target and target[0] == "natgrad":
                part = target[1] if len(target) > 1 and target[1] in parts else TOP
                yield node.lineno, part  # type: ignore[attr-defined]


def test_every_part_has_its_place_in_the_order() -> None:
    unknown = sorted({package_of(f) for f in FILES} - set(ORDER))
    assert not unknown, f"{unknown} stand nowhere in ORDER: decide what they may import, here and in the docs"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_run_one_way(file: Path) -> None:
    package = package_of(file)
    allowed = ORDER[: ORDER.index(package) + 1]
    wrong = [f"line {line} imports {part}" for line, part in imports(file) if part not in allowed]
    assert not wrong, f"{name_of(file)} may import {', '.join(allowed)}; but {'; '.join(wrong)}"


@pytest.mark.parametrize("file", INITS, ids=name_of)
def test_init_files_only_reexport_and_all_is_complete(file: Path) -> None:
    reexported: set[str] = set()
    declared: list[str] | None = None
    for index, node in enumerate(ast.parse(file.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and index == 0:
            continue  # the docstring
        if isinstance(node, ast.ImportFrom):
            if node.module == "__future__":
                continue
            names = [alias.asname or alias.name for alias in node.names]
            assert "*" not in names, (
                f"{name_of(file)}, line {node.lineno}: a star import hides what is public"
            )
            reexported.update(n for n in names if not n.startswith("_"))
            continue
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id == "__all__":
                declared = ast.literal_eval(node.value)
                continue
            if node.targets[0].id == "__version__" and file.parent == SOURCE:
                continue
        raise AssertionError(f"{name_of(file)}, line {node.lineno}: an __init__ only re-exports")
    if not reexported and declared is None:
        return
    assert declared is not None, f"{name_of(file)} re-exports {sorted(reexported)} without an __all__"
    assert len(declared) == len(set(declared)), f"{name_of(file)}: a name stands twice in __all__"
    assert set(declared) - {"__version__"} == reexported, (
        f"{name_of(file)}: __all__ lacks {sorted(reexported - set(declared))}, "
        f"and names what is not imported: {sorted(set(declared) - reexported)}"
    )


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_are_small_and_named_for_what_they_hold(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{name_of(file)} has {lines} lines; split it by idea at {MOST_LINES}"
    assert file.stem not in {"utils", "util", "helpers", "misc", "common"}, f"{name_of(file)} names no idea"


def modules() -> list[str]:
    """The dotted name of every module of natgrad but `__main__`, which runs on import. Imports nothing."""
    parts = [("natgrad", *f.relative_to(SOURCE).with_suffix("").parts) for f in FILES]
    names = [".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts]
    return [n for n in names if not n.endswith(".__main__")]


def public(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Yields (dotted name, object) for what a module defines in public, its classes' own methods too."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if not (inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value))):
            continue
        yield f"{module.__name__}.{name}", value
        if inspect.isclass(value):
            for member, attribute in vars(value).items():
                function = attribute.fget if isinstance(attribute, property) else attribute
                function = getattr(function, "__func__", function)
                if not member.startswith("_") and inspect.isfunction(function):
                    # An override is documented where it was declared; getdoc finds that.
                    yield f"{module.__name__}.{name}.{member}", getattr(value, member)


@pytest.mark.parametrize("name", modules())
def test_every_public_name_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} says nothing of itself"
    bare = [n for n, value in public(module) if not (inspect.getdoc(value) or "").strip()]
    assert not bare, f"no docstring: {', '.join(bare)}"


@pytest.mark.parametrize("name", modules())
def test_what_all_names_is_there(name: str) -> None:
    module = importlib.import_module(name)
    for exported in getattr(module, "__all__", ()):
        assert hasattr(module, exported), f"{name}.__all__ names {exported}, which is not there"


def test_importing_natgrad_needs_only_the_core_dependencies() -> None:
    """Refuses the extras at import, as on a machine where they are not installed."""
    program = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {NOT_CORE!r}:
            raise ModuleNotFoundError("not a core dependency: " + name, name=name)

import torch, jaxtyping  # what they bring themselves is theirs to answer for
before = set(sys.modules)
sys.meta_path.insert(0, Refuse())
import natgrad
new = {{m.split(".")[0] for m in set(sys.modules) - before}}
loaded = sorted(new & set({NOT_CORE!r}))
assert not loaded, loaded
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
