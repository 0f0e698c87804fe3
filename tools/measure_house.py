"""Measure the structure of the source: how often a reader has to jump, and whether one name means one thing.

    python tools/measure_house.py [folder]    # src/artaug unless given

Prints one line a measure, for the whole package and for each of its rooms.
"""

import ast
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ROOT = Path(__file__).parents[1] / "src" / "artaug"


@dataclass(frozen=True)
class Module:
    """One source file, parsed."""

    name: str
    """Dotted, below the package: ``training.loop``."""
    path: Path
    tree: ast.Module
    lines: int
    """All of them, blank ones too."""
    code: int
    """Lines that are neither blank nor part of a docstring."""
    comments: int
    """Lines that hold nothing but a comment, or end in one."""

    @property
    def room(self) -> str:
        """The first part of the name: a package, or a module at the top."""
        return self.name.split(".")[0]


def read(root: Path) -> list[Module]:
    """Parse every module below ``root``."""
    modules = []
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        with path.open("rb") as file:
            comments = sum(token.type == tokenize.COMMENT for token in tokenize.tokenize(file.readline))
        tree, lines = ast.parse(text), text.splitlines()
        filled = {number for number, line in enumerate(lines, 1) if line.strip()}
        code = len(filled - docstring_lines(tree))
        modules.append(Module(name, path, tree, len(lines), code, comments))
    return modules


def docstring_lines(tree: ast.Module) -> set[int]:
    """Numbers of the lines that docstrings take, of fields too."""
    texts = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )
    return {line for node in texts for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a module."""
    return (node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def called_once(module: Module) -> list[str]:
    """Private functions and methods that their module names exactly once besides defining them."""
    names = {node.name for node in functions(module) if node.name.startswith("_") and not node.name.startswith("__")}
    mentions = Counter(
        name
        for node in ast.walk(module.tree)
        if (name := getattr(node, "attr", None) or getattr(node, "id", None)) in names
    )
    return sorted(name for name in names if mentions[name] == 1)


def importers(modules: list[Module]) -> dict[str, set[str]]:
    """For every module the others that import it; an ``__init__``, which passes names on, does not count."""
    known = {module.name for module in modules}
    result: dict[str, set[str]] = {name: set() for name in known}
    for module in modules:
        if module.path.name == "__init__.py":
            continue
        for node in ast.walk(module.tree):
            targets: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("artaug"):
                base = node.module.removeprefix("artaug").removeprefix(".")
                targets = [base, *(f"{base}.{alias.name}".removeprefix(".") for alias in node.names)]
            elif isinstance(node, ast.Import):
                targets = [alias.name.removeprefix("artaug.") for alias in node.names]
            for target in targets:
                if target in known and target != module.name:
                    result[target].add(module.name)
    return result


def repeated_names(modules: list[Module]) -> dict[str, list[str]]:
    """Names of classes and type aliases that several modules define."""
    places: defaultdict[str, set[str]] = defaultdict(set)
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].add(module.name)
        for node in module.tree.body:
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias":
                places[ast.unparse(node.target).lstrip("_")].add(module.name)
    return {name: sorted(homes) for name, homes in sorted(places.items()) if len(homes) > 1}


def row(name: str, modules: list[Module], importing: dict[str, set[str]]) -> str:
    """One line of the table."""
    lines = sum(module.lines for module in modules)
    code = sum(module.code for module in modules)
    count = sum(1 for module in modules for _ in functions(module))
    once = sum(len(called_once(module)) for module in modules)
    comments = sum(module.comments for module in modules)
    lonely = sum(len(importing[module.name]) <= 1 and module.path.name != "__init__.py" for module in modules)
    return (
        f"{name:<12} {len(modules):>7} {lines:>7} {1000 * count / lines:>10.1f} {1000 * once / lines:>12.1f} "
        f"{100 * comments / code:>10.1f} {lonely:>13}"
    )


def main() -> None:
    """Print the table, then what stands out."""
    modules = read(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_ROOT)
    importing = importers(modules)
    print("room         modules   lines  functions  called once   comments  one importer")
    print("                               per 1,000    per 1,000  % of code       or none")
    for room in sorted({module.room for module in modules}):
        print(row(room or "artaug", [module for module in modules if module.room == room], importing))
    print(row("all", modules, importing))
    repeated = repeated_names(modules)
    print(f"\n{len(repeated)} names of classes or aliases stand in several modules:")
    for name, homes in repeated.items():
        print(f"  {name}: {', '.join(homes)}")


if __name__ == "__main__":
    main()
