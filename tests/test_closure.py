"""Which change of the code makes which stage stale: every module edited, every stage looked at."""

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from pipeline.launch.closure import Closure, c_tokens
from pipeline.stages.code import CALLS

pytestmark = pytest.mark.slow
MODULES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "pipeline").rglob("*.py"))
TRAININGS = ("train_classifier", "train_segmenter")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, for editing."""
    root = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "pipeline", root / "pipeline", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


@pytest.fixture(scope="module")
def before(copy: Path) -> dict[str, Closure]:
    return {stage: Closure(calls, copy) for stage, calls in CALLS.items()}


def stale(copy: Path, before: dict[str, Closure]) -> set[str]:
    return {stage for stage, calls in CALLS.items() if Closure(calls, copy).digest != before[stage].digest}


class Edited:
    """A file with other content inside the block."""

    def __init__(self, file: Path, content: str) -> None:
        self.file, self.content, self.original = file, content, file.read_text()

    def __enter__(self) -> None:
        self.file.write_text(self.content)

    def __exit__(self, *_: object) -> None:
        self.file.write_text(self.original)


@pytest.mark.parametrize("module", MODULES)
def test_comments_docstrings_annotations_and_layout_make_nothing_stale(
    module: str, copy: Path, before: dict[str, Closure]
) -> None:
    file = copy / module
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            node.body.insert(0, ast.Expr(ast.Constant("Another docstring.")))
    with Edited(file, f"# a comment\n{ast.unparse(ast.fix_missing_locations(tree))}\n\n\n# another\n"):
        assert stale(copy, before) == set()


class Change(ast.NodeTransformer):
    """Changes one constant or operator of a definition."""

    def __init__(self) -> None:
        self.done = False

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if not self.done and isinstance(node.value, int | float | str | bool):
            self.done = True
            return ast.Constant(f"{node.value} changed" if isinstance(node.value, str) else node.value * 4 + 1)
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return node if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if self.done:
            return node
        self.done = True
        return ast.BinOp(node.left, ast.Mod() if isinstance(node.op, ast.Add) else ast.Add(), node.right)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.value = node.value and self.visit(node.value)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.body = [self.visit(each) for each in node.body]  # annotations do not count
        return node


def changed_definitions(source: str) -> dict[str, str]:
    """For each function, class and constant of a module the source with one thing in it changed."""
    found = {}
    for index, statement in enumerate(ast.parse(source).body):
        match statement:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                pass
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                pass
            case _:
                continue
        tree = ast.parse(source)
        change = Change()
        body: Any = tree.body[index]
        tree.body[index] = change.visit(body)
        if change.done and name != "__all__":
            found[name] = ast.unparse(ast.fix_missing_locations(tree))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_a_changed_constant_or_operator_makes_stale_just_what_reaches_it(
    module: str, copy: Path, before: dict[str, Closure]
) -> None:
    file = copy / module
    name_of_module = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    changed = changed_definitions(file.read_text())
    users = {
        name: {stage for stage, code in before.items() if f"{name_of_module}:{name}" in code.definitions}
        for name in changed
    }
    # Of those with the same users, two: the last ones, which come to be reached by way of others.
    chosen = [name for name in users if name in [other for other in users if users[other] == users[name]][-2:]]
    for name in chosen:
        content, expected = changed[name], users[name]
        with Edited(file, content):
            assert stale(copy, before) == expected, name


@pytest.mark.parametrize(
    ("module", "old", "new", "stages"),
    [
        (
            "config.py",
            "self.learning_rate_per_1024 * self",
            "4 * self.learning_rate_per_1024 * self",
            {"train_classifier"},
        ),
        ("train/schedule.py", "math.pi", "math.tau", {"train_classifier"}),
        ("data/native/resize.c", "0.5", "0.25", {"train_classifier", "evaluate_classifier", "evaluate_released"}),
        ("models/native/block.c", "LANES = 64", "LANES = 32", {"evaluate_classifier", "evaluate_segmenter"}),
        ("metrics.py", "topk", "sort", {"evaluate_classifier", "evaluate_released"}),
        ("metrics.py", "bincount", "histc", {"evaluate_segmenter", "evaluate_released"}),
        ("launch/worker.py", "STALE_S = 60", "STALE_S = 61", set()),
        ("comparisons/table2.py", '"Top-1, %"', '"Accuracy"', {"compare_with_paper"}),
    ],
)
def test_what_is_known_to_matter_does_and_nothing_else(
    module: str, old: str, new: str, stages: set[str], copy: Path, before: dict[str, Closure]
) -> None:
    file = copy / "pipeline" / module
    assert old in file.read_text()
    with Edited(file, file.read_text().replace(old, new)):
        found = stale(copy, before)
    assert stages <= found
    if "train" not in module and module.startswith(("metrics", "launch", "report")):
        assert not found & set(TRAININGS)


def test_moving_a_definition_to_another_module_makes_nothing_stale(copy: Path, before: dict[str, Closure]) -> None:
    """`polynomial` moves from schedule.py, and its caller imports it from there."""
    schedule, task = copy / "pipeline/train/schedule.py", copy / "pipeline/tasks/segmentation/training.py"
    source = schedule.read_text()
    (function,) = [each for each in ast.parse(source).body if getattr(each, "name", "") == "polynomial"]
    moved = copy / "pipeline/train/elsewhere.py"
    moved.write_text(ast.unparse(function))
    imported = task.read_text().replace(
        "pipeline.train.schedule import polynomial", "pipeline.train.elsewhere import polynomial"
    )
    try:
        with Edited(schedule, source.replace("def polynomial", "def unused")), Edited(task, imported):
            assert stale(copy, before) == set()
    finally:
        moved.unlink()


def test_comments_and_layout_of_c_do_not_count_and_the_rest_does() -> None:
    source = '/* a */ int  f(int a) {  // b\n  return a + 1; }\n#define X  1 \\\n  + 2\nchar *s = "/* no */  c";\n'
    same = 'int f(int a) { return a+1; }\n#define X 1 + 2\nchar *s = "/* no */  c";\n'
    assert c_tokens(source) == c_tokens(same)
    for other in (same.replace("1;", "2;"), same.replace("  c", " c"), same.replace("int f", "intf")):
        assert c_tokens(source) != c_tokens(other)


def test_the_stage_writes_what_the_fingerprint_uses(in_checkout: Path, checkout: Any) -> None:
    checkout.pipeline("code")
    written = json.loads((in_checkout / "data/code/train_classifier.json").read_text())
    assert written["digest"] == Closure(CALLS["train_classifier"], in_checkout).digest
    assert "pipeline.train.loop:train" in written["definitions"]
