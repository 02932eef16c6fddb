"""Which part may import which: cli -> ml_backend -> worker.contract, worker.brush_rle <- worker <- evaluation."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TORCH_FREE = {"worker.contract", "worker.brush_rle"}
#: Modules of the command line, which may import a worker inside a function.
COMMANDS = re.compile(r"ml_backend\.(cli|commands\..*|demo_.*)")


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, *, lazy: bool) -> Iterator[str]:
    """Dotted names of what is imported; `lazy`: inside functions too. Imports for types alone are none."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not lazy:
            continue
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from (name for child in node.orelse for name in imports(child, lazy=lazy))
        else:
            yield from imports(node, lazy=lazy)


def imported(path: Path, *, lazy: bool) -> set[str]:
    return set(imports(ast.parse(path.read_text()), lazy=lazy))


def allowed_in_web(name: str) -> bool:
    return name == "worker" or any(name == free or name.startswith(f"{free}.") for free in TORCH_FREE)


@pytest.mark.parametrize("path", modules("ml_backend"), ids=name_of)
def test_the_web_process_imports_only_the_contract_of_the_worker(path: Path) -> None:
    names = imported(path, lazy=not COMMANDS.fullmatch(name_of(path)))
    forbidden = {n for n in names if n.split(".")[0] in {"torch", "torchvision", "laplace", "segment_anything"}}
    forbidden |= {n for n in names if n.split(".")[0] in {"worker", "evaluation"} and not allowed_in_web(n)}
    assert not forbidden


@pytest.mark.parametrize("path", modules("worker"), ids=name_of)
def test_the_worker_imports_neither_web_nor_evaluation(path: Path) -> None:
    names = imported(path, lazy=True)
    assert not {n for n in names if n.split(".")[0] in {"ml_backend", "evaluation"}}
    if name_of(path) in TORCH_FREE:
        assert not {n for n in names if n.split(".")[0] in {"torch", "worker"} and not allowed_in_web(n)}


@pytest.mark.parametrize("path", modules("evaluation"), ids=name_of)
def test_the_evaluation_does_not_import_the_web_process(path: Path) -> None:
    assert not {n for n in imported(path, lazy=True) if n.split(".")[0] == "ml_backend"}


def test_torch_is_never_loaded_by_the_web_process() -> None:
    names = [
        name_of(path) for path in modules("ml_backend") if path.stem != "__main__" and "migrations" not in path.parts
    ]
    program = f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module(name)\n"
    program += "print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'laplace', 'segment_anything')))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
