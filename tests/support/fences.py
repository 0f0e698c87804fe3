"""Runs the Python fences of a page of the docs, and checks without running them those that cannot run here."""

import ast
import importlib
import inspect
import re
import typing
from types import ModuleType

import artaug

FENCE = re.compile(
    r"^(?:<!-- (?:not executed|executed by (?P<test>\S+)): (?P<reason>[^\n]+) -->\n\n?)?```python\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


def names_of(tree, known):
    """What the names of a fence stand for without running it: imports, and variables whose class a call tells."""
    names = dict(known)
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=[ast.alias(name=name, asname=asname)]) if name.partition(".")[0] == "artaug":
                names[asname or "artaug"] = importlib.import_module(name)
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] == "artaug":
                exec(ast.unparse(node), names)
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call() as call):
                names[name] = value_of(call, names)
            case ast.withitem(context_expr=ast.Call() as call, optional_vars=ast.Name(id=name)):
                names[name] = value_of(call, names)
    return names


def value_of(node, names):
    """The object an expression stands for, the class of the one it would make, or None where that cannot be seen."""
    match node:
        case ast.Name(id=name):
            return names.get(name)
        case ast.Attribute(value=owner, attr=name):
            owner = value_of(owner, names)
            if isinstance(owner, ModuleType) and owner.__name__.partition(".")[0] == "artaug":
                assert hasattr(owner, name), f"{owner.__name__} has no {name}"
            if is_ours(owner):
                assert hasattr(owner, name) or name in getattr(owner, "__dataclass_fields__", {}), (
                    f"{owner} has no {name}"
                )
            return getattr(owner, name, None)
        case ast.Call(func=function):
            return returned_class(value_of(function, names))
    return None


def returned_class(function):
    """The class of what a call returns, or yields to a `with`, by its annotation."""
    if inspect.isclass(function) or not callable(function) or not is_ours(function):
        return function if inspect.isclass(function) else None
    try:
        returned = typing.get_type_hints(function).get("return")
    except NameError:  # a name that only a type checker imports
        return None
    if returned is typing.Self:
        return getattr(function, "__self__", None)
    return next(iter(typing.get_args(returned)), returned) if typing.get_origin(returned) else returned


def is_ours(value):
    """Whether a class, a function or an instance is defined by artaug."""
    owner = value if inspect.isroutine(value) or inspect.isclass(value) else type(value)
    return str(getattr(owner, "__module__", "")).partition(".")[0] == "artaug"


def check_calls(tree, names):
    """Look up every name that the fence takes from artaug, and bind the arguments of every call of ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            value_of(node, names)
        if not isinstance(node, ast.Call) or any(isinstance(part, ast.Starred) for part in node.args):
            continue
        function = value_of(node.func, names)
        elided = any(isinstance(part, ast.Constant) and part.value is ... for part in node.args)
        if callable(function) and is_ours(function) and not elided:
            owner = value_of(node.func.value, names) if isinstance(node.func, ast.Attribute) else None
            unbound = inspect.isclass(owner) and inspect.isfunction(inspect.getattr_static(owner, node.func.attr))
            keywords = {keyword.arg: ... for keyword in node.keywords if keyword.arg}
            unpacked = any(keyword.arg is None for keyword in node.keywords)  # **parts
            bind = getattr(inspect.signature(function), "bind_partial" if unpacked else "bind")
            try:
                bind(*[...] * (unbound + len(node.args)), **keywords)
            except TypeError as error:
                raise TypeError(f"{ast.unparse(node)}: {error}") from error


def run(page):
    """Run the fences of a page in one namespace, with the page's line numbers in tracebacks."""
    text = page.read_text(encoding="utf-8")
    namespace = {"__name__": "__main__"}
    shown = {"aa": artaug}
    for fence in FENCE.finditer(text):
        code = "\n" * text.count("\n", 0, fence.start("code")) + fence["code"]
        if fence["reason"]:
            tree = ast.parse(code, filename=page)
            shown = names_of(tree, shown | namespace)
            check_calls(tree, shown)
        else:
            exec(compile(code, page, "exec"), namespace)
