"""What the project promises of itself: its metadata, its pins, its front door."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pins() -> list[str]:
    """The requirements of constraints.txt, without comments and markers."""
    lines = [re.split(r"[;#]", line)[0].strip() for line in read("constraints.txt").splitlines()]
    return [line for line in lines if line]


def test_torch_is_pinned_in_constraints_alone() -> None:
    pinned = re.compile(r"torch\s*==\s*\d")
    assert [p for p in pins() if pinned.match(p)] == ["torch==2.13.0"]
    for name in ("pyproject.toml", "Makefile", ".ci/run"):
        assert not pinned.search(read(name)), f"{name} pins torch too"
    assert '"torch>=2.6"' in read("pyproject.toml")


def test_every_pin_is_exact_and_stands_once() -> None:
    names = []
    for pin in pins():
        name, exact, release = pin.partition("==")
        assert exact, f"{pin} is a range"
        assert release, f"{pin} names no release"
        names.append(name.lower().replace("_", "-"))
    assert len(names) == len(set(names))


def test_the_tools_have_one_release_in_both_files() -> None:
    for tool in ("ruff", "mypy"):
        (pin,) = [p for p in pins() if p.startswith(f"{tool}==")]
        assert f'"{pin}"' in read("pyproject.toml")


def test_metadata_of_the_installed_package() -> None:
    try:
        package = metadata.metadata("natgrad")
    except metadata.PackageNotFoundError:
        pytest.skip("natgrad is not installed here")
    core = [r for r in metadata.requires("natgrad") or [] if "extra ==" not in r]
    assert sorted(re.split(r"[^\w-]", r)[0] for r in core) == ["jaxtyping", "torch"]
    assert package["Requires-Python"] == ">=3.10"
    assert package["License-Expression"] == "Apache-2.0"
    (script,) = [e for e in metadata.entry_points(group="console_scripts") if e.name == "natgrad"]
    assert script.value == "natgrad.cli:main"


def test_the_version_is_the_same_everywhere() -> None:
    found = re.search(r'^version = "(.+)"$', read("pyproject.toml"), re.MULTILINE)
    assert found is not None
    assert re.search(r"^## \[(Unreleased|" + re.escape(found[1]) + r")\]", read("CHANGELOG.md"), re.MULTILINE)
    init = ROOT / "src" / "natgrad" / "__init__.py"
    for node in ast.parse(init.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            assert ast.literal_eval(node.value) == found[1]


def test_types_and_licence_are_shipped() -> None:
    assert (ROOT / "src" / "natgrad" / "py.typed").is_file()
    assert "Apache License\n                           Version 2.0" in read("LICENSE")


def test_ci_is_executable_and_calls_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^make test$", script.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_example_in_contributing_holds() -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", read("CONTRIBUTING.md"), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, "CONTRIBUTING.md", "exec"), names)
    laws = [law for name, law in names.items() if name.startswith("test_") and callable(law)]
    assert laws
    for law in laws:
        law()


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make on this machine")
def test_make_alone_lists_every_command() -> None:
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    (phony,) = re.findall(r"^\.PHONY: (.+)$", read("Makefile"), re.MULTILINE)
    for command in phony.split():
        assert re.search(rf"^  make {command} +\S", done.stdout, re.MULTILINE), (
            f"{command} has no description"
        )
