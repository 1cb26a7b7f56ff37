"""Imports point down, modules stay short, and only the command line speaks."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "agzo_edge"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
# Lowest first; what stands on one line knows nothing of its neighbours.
LAYERS = [
    {"errors", "units", "templates", "data_config", "config", "paths", "presets", "writers"},
    {"budget", "numerics"},
    {"model", "record"},
    {"train"},
    {"serve", "demo"},
    {"events", "rundir"},
    {"footprint"},
    {"scalars", "account", "evaluations", "preparation", "rebuild", "run_report"},
    {"session", "loading", "checkup", "verbs"},
    {"api"},
    {"cli"},
    {"__main__"},
]
WORDS = LAYERS[0]  # may know each other: config reports errors and parses units
MODULE_LINES, FUNCTION_LINES = 300, 60


def unit_of(path: Path) -> str:
    """The folder or top module that a file belongs to: "train", "errors"; "" for the package itself."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def level_of(unit: str) -> int:
    return next(level for level, units in enumerate(LAYERS) if unit in units)


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import in a file, those inside functions too, relative ones resolved."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = ["agzo_edge", *path.relative_to(PACKAGE).parent.parts]
            base = parent[: len(parent) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def imported_units(path: Path) -> Iterator[tuple[int, str]]:
    """Line and unit of every import of our own."""
    for line, name in imported_modules(path):
        package, _, rest = name.partition(".")
        unit = rest.split(".")[0]
        if package == "agzo_edge" and ((PACKAGE / f"{unit}.py").exists() or (unit and (PACKAGE / unit).is_dir())):
            yield line, unit


def test_every_module_has_a_layer() -> None:
    known = set().union(*LAYERS) | {""}
    assert {unit_of(path) for path in MODULES} <= known


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    unit = unit_of(path)
    if unit == "":  # the package offers the public verbs
        return
    wrong = [
        f"{path.name}:{line} imports {other}"
        for line, other in imported_units(path)
        if other != unit and not {unit, other} <= WORDS and level_of(other) >= level_of(unit)
    ]
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {path: ".".join(["agzo_edge", *path.relative_to(PACKAGE).with_suffix("").parts]) for path in MODULES}
    by_name = {name.removesuffix(".__init__"): path for path, name in names.items()}
    del by_name["agzo_edge"]  # its verbs are imported when they are first asked for

    def imports_of(path: Path) -> set[Path]:
        found = set()
        for _, name in imported_modules(path):
            parts = name.split(".")
            for cut in (len(parts), len(parts) - 1):
                if (target := by_name.get(".".join(parts[:cut]))) is not None and target != path:
                    found.add(target)
                    break
        return found

    left = {path: imports_of(path) for path in MODULES}
    while free := [path for path, needs in left.items() if not needs & left.keys()]:
        for path in free:
            del left[path]
    assert sorted(str(path.relative_to(PACKAGE)) for path in left) == []


def test_the_budget_and_the_words_do_without_torch() -> None:
    heavy = {"torch", "transformers", "bitsandbytes", "peft", "accelerate"}
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in MODULES
        if unit_of(path) in WORDS | {"budget"}
        for line, name in imported_modules(path)
        if name.split(".")[0] in heavy
    ]
    assert wrong == []


def test_only_the_command_line_prints_and_exits() -> None:
    wrong = []
    for path in MODULES:
        if unit_of(path) in {"cli", "__main__"} or path.name.startswith("make_"):  # scripts that made the demo
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {
                "print",
                "sys.exit",
                "exit",
                "input",
            }:
                wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert wrong == []


def test_nobody_touches_the_global_random_state() -> None:
    names = {"torch.manual_seed", "torch.seed", "torch.cuda.manual_seed", "np.random.seed", "random.seed"}
    wrong = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in MODULES
        if not path.name.startswith("make_") and unit_of(path) != "serve"  # transformers samples from nothing else
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names
    ]
    assert wrong == []


def test_modules_and_functions_stay_short() -> None:
    wrong = []
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        if (n_lines := text.count("\n")) > MODULE_LINES:
            wrong.append(f"{path.relative_to(PACKAGE)}: {n_lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                n_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if n_lines > FUNCTION_LINES:
                    wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}: {n_lines} lines")
    assert wrong == []


def test_this_test_sees_a_forbidden_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "numerics"
    folder.mkdir()
    (tmp_path / "train").mkdir()
    (tmp_path / "errors.py").write_text("")
    path = folder / "bad.py"
    path.write_text("def f():\n    from agzo_edge.train import step\n    from ..errors import AgzoError\n")
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    assert list(imported_units(path)) == [(2, "train"), (3, "errors")]
    with pytest.raises(AssertionError, match=r"bad\.py:2 imports train"):
        test_imports_point_down(path)
