"""The house as it stands: its floors, what its wheel holds, and that it shadows nobody's package."""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_paged import batch, plugins, request, stats, types

ROOT = Path(__file__).resolve().parent.parent

# Lowest first. A module imports from its own floor and those below.
FLOORS = (
    {
        "_version",
        "batch",
        "disposable",
        "errors",
        "forks",
        "params",
        "protocols",
        "request",
        "stats",
        "strict_json",
        "types",
    },
    {"config", "hookspecs", "ledger"},
    {"engine", "plugins", "text"},
    {"hf"},
    {"llm", "llm_requests", "vllm_names"},
    {"arguments", "server"},
    {"bench", "cli", "__main__"},
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# The one part of hf_paged that may import a library. Kernels are the plugins', and measured by the benchmarks.
IMPORTER = {"accelerate": "hf", "peft": "hf", "transformers": "hf", "fastapi": "server", "hf_paged_kernels": "bench"}
PUBLIC = ("batch", "config", "disposable", "errors", "params", "protocols", "request", "stats", "types")
PUBLIC_MODULES = {f"hf_paged.{name}" for name in PUBLIC}


# ------------------------------------------------------------------------------------------------------------- imports


def modules(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found, f"{folder} holds no modules"
    return found


def imported(path: Path, *, for_type_checkers: bool = False) -> Iterator[str]:
    """What a module imports, wherever in it: 'package.module', or 'hf_paged.Name'."""
    for node in (ast.walk if for_type_checkers else walk)(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = ".".join([*package_of(path, node.level), *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{source}.{alias.name}"
                yield name if is_module(name) or source == "hf_paged" else source


def parts_of(path: Path) -> tuple[str, ...]:
    home = next(folder for folder in (ROOT / "kernels", ROOT / "plugins", ROOT) if path.is_relative_to(folder))
    return path.relative_to(home).with_suffix("").parts


def package_of(path: Path, level: int) -> tuple[str, ...]:
    """The package that a relative import starts from; nothing for an absolute one."""
    return parts_of(path)[:-level] if level else ()


def walk(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield from [other, *walk(other)]
            continue
        yield child
        yield from walk(child)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def part_of(name: str) -> str:
    """The part of hf_paged that a module's name lies in; 'hf_paged' for its public names."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and is_module(".".join(parts[:2])) else "hf_paged"


def part_at(path: Path) -> str:
    first = path.relative_to(ROOT / "hf_paged").parts[0]
    return first.removesuffix(".py")


PACKAGE = [path for path in modules(ROOT / "hf_paged") if path != ROOT / "hf_paged" / "__init__.py"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_a_module_imports_only_from_its_own_floor_and_below(path):
    own = part_at(path)
    assert own in FLOOR_OF, f"hf_paged/{own} is on no floor yet: give it one in FLOORS"
    for name in imported(path):
        package = name.split(".")[0]
        if package == "hf_paged":
            part = part_of(name)
            assert part != "hf_paged", f"{own} imports {name} from the package: import the module that it is in"
            assert FLOOR_OF[part] <= FLOOR_OF[own], f"{own} imports {name}, which lies above it"
        assert IMPORTER.get(package, own) == own, f"{own} imports {name}: that is for {IMPORTER[package]} alone"
        assert not package.startswith("hf_paged_") or package in IMPORTER, f"{own} imports the plugin {name}"


LOWEST = [path for path in PACKAGE if part_at(path) in FLOORS[0]]


@pytest.mark.parametrize("paths", [LOWEST, modules(ROOT / "plugins")], ids=["the lowest floor", "plugins"])
def test_no_two_modules_need_each_other_even_for_type_checkers(paths):
    needs = {".".join(parts_of(path)): {*imported(path, for_type_checkers=True)} for path in paths}
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError


@pytest.mark.parametrize("path", modules(ROOT / "kernels"), ids=name_of)
def test_kernels_import_torch_and_triton_alone(path):
    allowed = {"torch", "triton", "hf_paged_kernels"} | sys.stdlib_module_names
    assert {name.split(".")[0] for name in imported(path)} <= allowed


@pytest.mark.parametrize("path", modules(ROOT / "plugins"), ids=name_of)
def test_plugins_import_public_names_alone(path):
    for name in imported(path):
        if name.split(".")[0] == "hf_paged":
            module = ".".join(name.split(".")[:2])
            assert part_of(name) == "hf_paged" or module in PUBLIC_MODULES, f"{name} is internal"


def test_the_names_that_types_had_are_still_found_there():
    for name in types.__all__:
        assert any(getattr(module, name, None) is getattr(types, name) for module in (batch, request, stats))


@pytest.mark.parametrize("name", ["hf_paged.engine.blocks", "hf_paged.engine.scheduler"])
def test_blocks_and_scheduler_need_no_torch(name):
    pending, seen = [name], set()
    while pending:
        module = pending.pop()
        if module in seen or not is_module(module):
            continue
        seen.add(module)
        path = ROOT.joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        names = set(imported(path))
        assert not {other for other in names if other.split(".")[0] == "torch"}, f"{module} imports torch"
        pending += names


# --------------------------------------------------------------------------------------------------- the name `kernels`


def python(code: str, cwd: Path, **environment: str) -> str:
    """What a fresh interpreter prints, its working directory first on the path."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_repository_does_not_shadow_kernels(tmp_path):
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "from transformers.utils import is_kernels_available as f; print(f())"
    assert python(code, ROOT) == python(code, tmp_path)


def test_an_installed_kernels_is_found_from_the_repository(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("WHO = 'installed'")
    assert python("import kernels; print(kernels.WHO)", ROOT, PYTHONPATH=str(tmp_path)) == "installed"


# ------------------------------------------------------------------------------------------------------------ the wheel


def test_the_wheel_holds_its_packages_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("hf_paged-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (points,) = [name for name in names if name.endswith("entry_points.txt")]
        entry_points = archive.read(points).decode()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    bundled = {f"plugins/{name}" for name in plugins.BUNDLED}
    assert top == {"hf_paged", "hf_paged_kernels", *plugins.BUNDLED}
    for folder in ("hf_paged", "kernels/hf_paged_kernels", *bundled):
        for path in modules(ROOT / folder):
            assert str(path.relative_to((ROOT / folder).parent)) in names
    assert {"hf_paged/py.typed", "hf_paged_dashboard/page.html"} <= set(names)
    results = ROOT / "hf_paged" / "bench" / "results"  # of benchmarks: for readers of the repository alone
    assert any(results.glob("*.json"))
    assert not [name for name in names if name.startswith("hf_paged/bench/results")]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "hf-paged = hf_paged.cli:main" in entry_points


def test_bundled_plugins_import_no_optional_library():
    optional = ("aiohttp", "fastapi", "llguidance", "opentelemetry", "prometheus_client")
    code = (
        "import sys; from hf_paged import PagedConfig, cli, plugins; plugins.load(PagedConfig()); "
        f"print([name for name in {optional} if name in sys.modules])"
    )
    assert python(code, ROOT) == "[]"
