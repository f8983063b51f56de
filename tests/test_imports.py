"""Imports point one way, and importing the package is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "rankwise"
LAYERS = [
    {"linalg"},
    {"matrices"},
    {"core"},
    {
        "measures",
        "compressors",
        "allocators",
        "models",
        "initialisers",
        "layers",
        "projectors",
        "rank_rules",
        "schedules",
    },
    {"adapters", "estimators", "optimizers", "preconditioners", "starts"},
    {"exporters", "serving"},
    {"compression"},
    {"api"},
    {
        "absorbing",
        "adapting",
        "certificate",
        "curvature",
        "estimating",
        "narrowing",
        "preconditioning",
        "quickstart",
        "streaming",
        "training",
    },
    {"following"},
    {"checking", "pretraining", "trainer"},
    {"guarding", "planning"},
    {"finetuning"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
HEAVY = {
    "transformers",
    "matplotlib",
    "rich",
    "typer",
    "jinja2",
    "tokenizers",
    "huggingface_hub",
    "gguf",
    "onnx",
    "vllm",
}
LIGHT = (
    *(name for names in LAYERS[:5] for name in sorted(names - {"models"})),
    "exporters",
    "serving",
    "compression",
    "api",
)
RIVALS = {"galore_torch", "mergekit", "peft"}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem in LEVEL)


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path, statement: ast.stmt) -> list[str]:
    """The absolute names that an import statement asks for."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    if not isinstance(statement, ast.ImportFrom):
        return []
    here = ("rankwise", *path.relative_to(ROOT).with_suffix("").parts)
    base = ".".join(here[: len(here) - statement.level]) if statement.level else ""
    module = ".".join(part for part in (base, statement.module) if part)
    return [f"{module}.{alias.name}" if module == "rankwise" else module for alias in statement.names]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path):
    mine = package_of(path)
    assert mine in LEVEL, f"{mine} is not in the table of layers"
    for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for name in imported(path, statement) if isinstance(statement, ast.stmt) else ():
            other = name.split(".")[1] if name.startswith("rankwise.") else None
            downward = other == mine or LEVEL.get(other, -1) < LEVEL[mine]
            if other in LEVEL and not downward:
                pytest.fail(f"{path.relative_to(ROOT)}:{statement.lineno} imports {name}, which is not below it")


@pytest.mark.parametrize("path", [f for f in FILES if package_of(f) in LIGHT], ids=lambda path: path.name)
def test_light_packages_import_heavy_ones_only_where_used(path: Path):
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        assert not HEAVY & {name.split(".")[0] for name in imported(path, statement)}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_rivals_are_never_imported(path: Path):
    for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = imported(path, statement) if isinstance(statement, ast.stmt) else []
        assert not RIVALS & {name.split(".")[0] for name in names}


def test_importing_rankwise_is_light():
    code = f"import rankwise, sys; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
