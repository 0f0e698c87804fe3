"""How the documentation is built: every warning is an error, every example runs, nothing is downloaded."""

import dataclasses
import inspect
import logging
import os
import re
import typing
from importlib import import_module
from pathlib import Path
from types import ModuleType

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.nodes import make_refnode

import artaug

HERE = Path(__file__).parent

# What other libraries log about themselves is no news of ours, neither here nor in the kernels that run the cells.
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["JUPYTER_PATH"] = str(HERE / "jupyter")
logging.getLogger("traitlets").setLevel(logging.WARNING)

project = "artaug"
author = "the artaug developers"
project_copyright = author
release = version = artaug.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.doctest", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "jupyter"]

html_theme = "furo"
html_title = "artaug"
html_static_path = ["_static"]
html_js_files = ["accessible.js"]

toc_object_entries_show_parents = "hide"  # "On this page" lists `Box`, not `artaug.Box`
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
default_role = "py:obj"  # `Box` in a docstring is a link, and a misspelt one an error; ``code`` is code

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# Notebooks live with the examples and are executed here, where pages are beside them.
for notebook in (HERE.parent / "examples").glob("*.ipynb"):
    text = notebook.read_text(encoding="utf-8").replace("](../docs/", "](")
    (HERE / notebook.name).write_text(text, encoding="utf-8")
nb_execution_mode = "cache"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 900
nb_merge_streams = True
nb_output_stderr = "remove"  # what libraries say while they load

# Names of other libraries need their inventories, which need the network. Every name of ours is checked.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(collections|contextlib|fractions|jaxtyping|np|numpy|nn|os|pathlib|PIL|pydantic|safetensors|torch|typing)\..*",
    ),
    (r"py:.*", r"(accelerate|diffusers|peft|transformers)\..*"),
    (
        r"py:.*",
        r"(Bool|Callable|Float|Generator|Image|Int|Iterable|Iterator|Mapping|Module|ndarray|Path|Sequence|Tensor)",
    ),
    (r"py:.*", r"(PreTrainedModel|ProcessorMixin|QuantizationConfigMixin|(CLIP|Siglip|Blip)\w*Model|Figure)"),
    (r"py:.*", r"(artaug\..*\.)?T"),  # a type variable
]


def show_public_paths(package: ModuleType) -> None:
    """Show the path people import from: `artaug.scorers.Chroma`, not the module it is written in."""
    for exported in (getattr(package, name) for name in package.__all__):
        if inspect.isclass(exported) and exported.__module__.startswith(f"{package.__name__}."):
            exported.__module__ = package.__name__


def gather_field_docs(package: ModuleType) -> None:
    """Let autodoc find the strings below fields, although exports say they come from the package itself."""
    gathered = ModuleAnalyzer.for_module(package.__name__)
    gathered.analyze()
    for path in Path(package.__path__[0]).rglob("[!_]*.py"):
        part = ModuleAnalyzer.for_file(path, path.stem)
        part.analyze()
        gathered.attr_docs.update(part.attr_docs)
        gathered.tagorder.update(part.tagorder)


def show_plain_types(package: ModuleType) -> None:
    """Show `Annotated[float, Field(gt=0)] = 1.0` as `float = 1.0`: the sentence below the field says the range."""
    for _, cls in inspect.getmembers(package, lambda one: inspect.isclass(one) and dataclasses.is_dataclass(one)):
        try:
            plain = typing.get_type_hints(cls)
        except NameError:  # names that only a type checker imports are shown as they are written
            continue
        signature = inspect.signature(cls)
        parameters = [
            one.replace(
                annotation=plain.get(one.name, one.annotation),
                default=... if repr(one.default) == "<factory>" else one.default,
            )
            for one in signature.parameters.values()
        ]
        cls.__signature__ = signature.replace(parameters=parameters)
        cls.__annotations__.update({name: plain[name] for name in cls.__annotations__})


PACKAGES = (
    "critics",
    "diffusion",
    "evaluation.suites",
    "hub",
    "lora.formats",
    "playground",
    "regional",
    "regional.attention_losses",
    "review",
    "scorers",
    "testing",
    "training",
)
for name in ("artaug", *(f"artaug.{package}" for package in PACKAGES)):
    package = import_module(name)
    show_public_paths(package)
    gather_field_docs(package)
    show_plain_types(package)


def keep_colons(_app: Sphinx, what: str, *described: object) -> None:
    """Keep Napoleon from reading "At most this many: each costs time" below a field as a type and its meaning."""
    lines = described[-1]
    if what in {"attribute", "data", "property"} and lines:
        lines[0] = f": {lines[0]}"


def find_by_last_name(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, text: nodes.Element
) -> nodes.Node | None:
    """Let `Chroma` find artaug.scorers.Chroma from anywhere, as long as only one public name ends so."""
    last = f".{node['reftarget'].rpartition('.')[2]}"
    found = [one for one in env.domains.python_domain.get_objects() if one[0].endswith(last) and one[2] not in MEMBERS]
    if node.get("refdomain") != "py" or len(found) != 1:
        return None
    name, _, _, page, anchor, _ = found[0]
    return make_refnode(app.builder, node["refdoc"], page, anchor, [text], name)


MEMBERS = {"attribute", "method", "property"}

# Exports say that they come from the package they are imported from: where a class is written, only the files say.
CLASS = re.compile(r"^class (\w+)", re.MULTILINE)
SOURCES = Path(artaug.__path__[0])
WRITTEN_IN = {
    name: ".".join(("artaug", *path.relative_to(SOURCES).with_suffix("").parts)).removesuffix(".__init__")
    for path in SOURCES.rglob("*.py")
    for name in CLASS.findall(path.read_text(encoding="utf-8"))
}


def find_source(_app: Sphinx, module: str, name: str) -> str | None:
    """Say for `[source]` in which module a class, its member or a function is written."""
    owner = name.partition(".")[0]
    function = inspect.unwrap(getattr(import_module(module), owner, None))
    return function.__globals__["__name__"] if inspect.isfunction(function) else WRITTEN_IN.get(owner)


def setup(app: Sphinx) -> None:
    """Connect what Sphinx calls back; Napoleon's handlers have the usual priority of 500."""
    app.connect("autodoc-process-docstring", keep_colons, priority=400)
    app.connect("missing-reference", find_by_last_name)
    app.connect("viewcode-follow-imported", find_source)
