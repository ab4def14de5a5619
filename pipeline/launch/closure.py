"""The code that a result depends on, found by reading it: every function, class and constant that a call reaches.

Nothing is imported. From the calls on, names are followed through the package's modules; what is found is hashed as
syntax trees, so that comments, docstrings, annotations of functions and layout do not count. A definition counts by its
name and content, not by its module: moving it elsewhere changes nothing. C sources count without comments and white
space.
"""

import ast
import copy
import functools
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "pipeline"
Place = tuple[str, str]
"""Module and name of a definition."""
EFFECTS = "<module>"
"""Stands for a name: the statements of a module that run at import and define nothing."""
_EXTENSION = re.compile(rf"({PACKAGE}(?:\.\w+)*)\._\w+")
_C_TEXT = r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\''
_C_TEXT_OR_COMMENT = re.compile(rf"({_C_TEXT})|/\*.*?\*/|//[^\n]*|\\\n", re.S)
_C_TOKEN = re.compile(rf"{_C_TEXT}|\w+|\S")


@dataclass
class _Module:
    """What one file defines, imports, and does at import."""

    name: str
    is_package: bool
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    effects: list[ast.stmt] = field(default_factory=list)


class Closure:
    """The definitions that `calls` ('module:function' each) reach in the package below `root`.

    `definitions` has a digest for each as 'module:name', C sources among them by their path.
    """

    def __init__(self, calls: tuple[str, ...], root: Path) -> None:
        self.root = root
        self.definitions: dict[str, str] = {}
        self._modules: dict[str, _Module | None] = {}
        pending: list[Place] = []
        for call in calls:
            module, name = call.split(":")
            places = list(self._resolve(module, (name,)))
            if not places:
                raise LookupError(f"{call} is not defined")
            pending += places
        seen: set[Place] = set()
        while pending:
            place = pending.pop()
            if place in seen:
                continue
            seen.add(place)
            pending += self._reached_from(*place)
        self.definitions = dict(sorted(self.definitions.items()))

    @functools.cached_property
    def digest(self) -> str:
        """Of all definitions, whatever modules they are in."""
        entries = sorted(f"{place.rpartition(':')[2]} {digest}" for place, digest in self.definitions.items())
        return hashlib.sha256("\n".join(entries).encode()).hexdigest()

    def _reached_from(self, module_name: str, name: str) -> list[Place]:
        module = self._module(module_name)
        assert module is not None
        statements = module.effects if name == EFFECTS else module.definitions[name]
        if statements:
            self.definitions[f"{module_name}:{name}"] = _sha("\n".join(_facts(each).text for each in statements))
        # Importing a module also runs what it does, and its parents' __init__.
        parents = module_name.split(".")
        reached = [(".".join(parents[:i]), EFFECTS) for i in range(1, len(parents) + 1)]
        for statement in statements:
            reached += self._references(module, _facts(statement))
        return [place for place in reached if self._module(place[0]) is not None]

    def _references(self, module: _Module, facts: "_Facts") -> Iterator[Place]:
        """The definitions of the package that a statement names, directly or through imports, its own included."""
        local: dict[str, tuple[str, str | None]] = {}
        for node in facts.imports:
            local.update(_imported(node, module))
        for package in facts.extensions_of:
            self._add_native(package)
        for path in facts.names:
            if path[0] in local:
                yield from self._follow(local[path[0]], path[1:])
            else:
                yield from self._resolve(module.name, path)

    def _resolve(self, module_name: str, path: tuple[str, ...]) -> Iterator[Place]:
        """The definitions that a dotted name refers to in a module; none for builtins, locals and other packages."""
        module = self._module(module_name)
        if module is None:
            return
        if path[0] in module.definitions:
            yield module_name, path[0]
        elif path[0] in module.imports:
            yield from self._follow(module.imports[path[0]], path[1:])
        elif module.is_package and self._module(f"{module_name}.{path[0]}") is not None:
            yield from self._follow((f"{module_name}.{path[0]}", None), path[1:])

    def _follow(self, target: tuple[str, str | None], path: tuple[str, ...]) -> Iterator[Place]:
        """The definitions that an imported name and its attributes refer to."""
        module_name, name = target
        if name is not None:
            if self._module(f"{module_name}.{name}") is None:
                yield from self._resolve(module_name, (name, *path))
                return
            module_name = f"{module_name}.{name}"
        module = self._module(module_name)
        if module is None:
            return
        yield module_name, EFFECTS
        if path:
            yield from self._resolve(module_name, path)
        else:  # a module as a value: anything of it may be used
            yield from ((module_name, definition) for definition in module.definitions)

    def _add_native(self, package: str) -> None:
        """An extension module `package._name` is built from the C sources in `package/native`, by pyproject.toml."""
        if (project := self.root / "pyproject.toml").exists():
            self.definitions[f"C:{package} build"] = _sha(_build(package, project.read_text()))
        for file in sorted((self.root / package.replace(".", "/") / "native").glob("*.[ch]")):
            self.definitions[f"C:{file.name}"] = _sha(c_tokens(file.read_text()))

    def _module(self, name: str) -> _Module | None:
        if name not in self._modules:
            self._modules[name] = _read(name, self.root) if name.split(".")[0] == PACKAGE else None
        return self._modules[name]


def _read(name: str, root: Path) -> _Module | None:
    base = root / name.replace(".", "/")
    for file in (base / "__init__.py", base.with_suffix(".py")):
        if file.exists():
            there = file.stat()
            return _read_file(name, file, there.st_mtime_ns, there.st_size)
    return None


@functools.lru_cache(maxsize=4096)
def _read_file(name: str, file: Path, mtime_ns: int, size_bytes: int) -> _Module:
    """Cached per version of a file."""
    module = _Module(name, file.name == "__init__.py")
    _collect(module, ast.parse(file.read_text(), str(file)).body)
    return module


def _collect(module: _Module, statements: list[ast.stmt]) -> None:
    for statement in statements:
        match statement:
            case ast.Import() | ast.ImportFrom():
                module.imports.update(_imported(statement, module))
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                module.definitions.setdefault(name, []).append(statement)
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                if name != "__all__":
                    module.definitions.setdefault(name, []).append(statement)
            case ast.Assign(targets=[ast.Tuple(elts=names)]) if all(isinstance(each, ast.Name) for each in names):
                for each in names:
                    assert isinstance(each, ast.Name)
                    module.definitions.setdefault(each.id, []).append(statement)
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), body=body):  # a lazy package front says here what it has
                _collect(module, [each for each in body if isinstance(each, ast.Import | ast.ImportFrom)])
            case ast.Expr(value=ast.Constant()):
                pass  # a docstring
            case _:
                module.effects.append(statement)
                for node in ast.walk(statement):
                    if isinstance(node, ast.Import | ast.ImportFrom):
                        module.imports.update(_imported(node, module))


def _imported(node: ast.Import | ast.ImportFrom, module: _Module) -> dict[str, tuple[str, str | None]]:
    if isinstance(node, ast.Import):
        names: dict[str, tuple[str, str | None]] = {}
        for alias in node.names:
            names[alias.asname or alias.name.split(".")[0]] = (
                alias.name if alias.asname else alias.name.split(".")[0],
                None,
            )
        return names
    source = node.module or ""
    if node.level:
        parents = module.name.split(".") if module.is_package else module.name.split(".")[:-1]
        source = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
    return {alias.asname or alias.name: (source, alias.name) for alias in node.names}


def _dotted(node: ast.AST) -> list[str]:
    """The parts of `a.b.c`; empty if it does not begin with a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else []


class _Stripping(ast.NodeTransformer):
    """Removes what computes nothing: docstrings, and annotations inside functions and of their arguments."""

    in_function = False

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        outside, self.in_function = self.in_function, True
        self.generic_visit(node)
        self.in_function = outside
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = _function  # noqa: N815

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        outside, self.in_function = self.in_function, False
        self.generic_visit(node)
        self.in_function = outside
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        self.generic_visit(node)
        if not self.in_function:
            return node
        return None if node.value is None else ast.Assign([node.target], node.value)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)


@dataclass(frozen=True)
class _Facts:
    """The content of a statement, and what it names."""

    text: str
    names: tuple[tuple[str, ...], ...]
    """Dotted names, each as its parts."""
    imports: tuple[ast.Import | ast.ImportFrom, ...]
    extensions_of: tuple[str, ...]
    """Packages whose extension modules it loads."""


@functools.lru_cache(maxsize=65536)
def _facts(statement: ast.stmt) -> _Facts:
    tree = _Stripping().visit(copy.deepcopy(statement))
    nodes = list(ast.walk(tree))
    inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}  # parts of a longer dotted name
    names = [_dotted(node) for node in nodes if isinstance(node, ast.Name | ast.Attribute) and id(node) not in inner]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return _Facts(
        _dump(tree),
        tuple(dict.fromkeys(tuple(name) for name in names if name)),
        tuple(node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)),
        tuple(match[1] for text in texts if (match := _EXTENSION.fullmatch(text))),
    )


def _dump(node: object) -> str:
    """A syntax tree as text, the same for all Python versions: without empty fields and imports."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return ""
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if name not in ("ctx", "kind", "type_comment")]
        parts = [f"{name}={_dump(value)}" for name, value in fields if value not in (None, [])]
        return f"{type(node).__name__}({','.join(parts)})"
    if isinstance(node, list):
        return f"[{','.join(map(_dump, node))}]"
    return repr(node)


@functools.lru_cache(maxsize=256)
def _build(package: str, project: str) -> str:
    """How `project`, the content of pyproject.toml, says that a package's extension modules are built."""
    modules = tomllib.loads(project)["tool"]["setuptools"]["ext-modules"]
    return json.dumps([module for module in modules if module["name"].rpartition(".")[0] == package], sort_keys=True)


@functools.lru_cache(maxsize=256)
def c_tokens(text: str) -> str:
    """C source without comments and layout: one token per line, with markers around preprocessor lines."""
    tokens: list[str] = []
    for line in _C_TEXT_OR_COMMENT.sub(lambda match: match[1] or " ", text).split("\n"):
        found = _C_TOKEN.findall(line)
        tokens += ["<line>", *found, "</line>"] if found[:1] == ["#"] else found
    return "\n".join(tokens)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
