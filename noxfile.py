"""The one door: every check, the demo and the benchmarks. `nox --list` says what there is."""

import re
import shutil
import tarfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"  # and so pip, which honours the constraints and local wheels
nox.options.reuse_venv = "yes"
nox.options.error_on_external_run = True
nox.options.sessions = ["lint", "types", "tests"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def install(session: nox.Session, *requirements: str, group: str | None = None) -> None:
    """Install into the session's environment, at the tested versions."""
    members = nox.project.dependency_groups(PYPROJECT, group) if group else ()
    session.install("--constraint", "constraints.txt", *requirements, *members)


def install_tests(session: nox.Session) -> None:
    """Install the package with what its tests need."""
    install(session, "--editable", ".[optimizers,parquet,report,scale,vlm]", group="tests")


@nox.session
def lint(session: nox.Session) -> None:
    """Check format, style, spelling, the floors of the package and the changelog fragments."""
    install(session, group="lint")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("typos")
    session.run("lint-imports", env={"PYTHONPATH": "src"})
    session.run("towncrier", "build", "--draft", "--version", "next", silent=True)


@nox.session
def types(session: nox.Session) -> None:
    """Check every annotation with mypy, strictly; and that a critic written as the docs show passes, too."""
    install(session, "--editable", ".[report,scale]", group="types")
    session.run("mypy", "src", "tools", "examples", "benchmarks")
    written_by_users = Path(session.create_tmp()).resolve() / "critics.py"
    written_by_users.write_text("".join(FENCE.findall(Path("docs/critics.md").read_text("utf-8"))), "utf-8")
    session.run("mypy", str(written_by_users))


PARALLEL = ("--numprocesses", "auto", "--dist", "worksteal")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the test suite on every core, with the examples of the docstrings; what follows -- goes to pytest, in one process."""
    install_tests(session)
    session.run("pytest", *(session.posargs or PARALLEL))


@nox.session
def coverage(session: nox.Session) -> None:
    """Run the test suite on every core, and say which lines no test runs. Counting them takes a while, so CI does not."""
    install_tests(session)
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", *PARALLEL)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")


@nox.session
def lowest(session: nox.Session) -> None:
    """Run the test suite on the lowest versions that pyproject.toml declares; torch stays as in constraints.txt.

    A lower torch has no CPU wheel for Linux on the index: its build for CUDA is several gigabytes.
    """
    project = PYPROJECT["project"]
    declared = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    tested = Path("constraints.txt").read_text("utf-8").splitlines()
    (torch,) = (line for line in tested if line.startswith("torch=="))
    pins = Path(session.create_tmp()).resolve() / "lowest.txt"
    floors = [line.replace(">=", "==") for line in declared if not line.startswith("torch>")]
    pins.write_text("\n".join([torch, *floors]), "utf-8")
    session.install("--constraint", str(pins), "--editable", ".[optimizers,parquet,report,scale,vlm]")
    session.install("--constraint", str(pins), *nox.project.dependency_groups(PYPROJECT, "tests"))
    # Warnings of old versions about their own dependencies are not ours to heed.
    options = ["-o", "filterwarnings=default", *PARALLEL]
    session.run("pytest", *options, *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """Run the tests that need a CUDA device."""
    install(session, "--editable", ".[optimizers,parquet,report,scale,vlm]", group="tests")
    session.run("pytest", "-m", "gpu", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation with every warning an error, and run its examples and its notebook."""
    install(session, "--editable", ".[report,scale]", group="docs")
    for builder in ("html", "doctest"):
        session.run("sphinx-build", "-W", "-n", "--keep-going", "-q", "-b", builder, "docs", f"docs/_build/{builder}")


@nox.session
def demo(session: nox.Session) -> None:
    """Run the whole loop on the playground: ends with a table, a picture report and a LoRA in runs/quickstart."""
    install(session, "--editable", ".[report]")
    session.run("python", "examples/quickstart.py", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Fuzz every reader of foreign bytes for ten minutes; after --, readers and --minutes. Findings go to tests/corpus."""
    install(session, "--editable", ".", group="tests")
    session.run("python", "tools/fuzz.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Run every benchmark; arguments after -- are handed to each, such as --quick."""
    drawing = nox.project.dependency_groups(PYPROJECT, "emoji")
    install(session, "--editable", ".[optimizers,report,scale]", *drawing, group="judges")
    for path in sorted(Path("benchmarks").glob("[!_]*.py")):
        if path.stem not in {"gpu", "on_flux"}:  # which takes the others' functions; which needs FLUX.1-dev
            session.run("python", "-m", f"benchmarks.{path.stem}", *session.posargs)


@nox.session
def wheels(session: nox.Session) -> None:
    """Download into .whl what artaug and the tests marked ``gpu`` need beside torch, for a machine without a network.

    What follows ``--`` is that machine's Python, 3.12 if nothing does; it is taken to be Linux on x86-64, with torch, NumPy,
    pillow and matplotlib.
    """
    python = session.posargs[0] if session.posargs else "3.12"
    platforms = [f"--platform=manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_24", "_2_17", "2014", "1")]
    target = ["--only-binary=:all:", "--no-deps", "--implementation=cp", f"--python-version={python}", *platforms]
    session.run(
        "python",
        "-m",
        "pip",
        "download",
        "-c",
        "constraints.txt",
        *target,
        "--dest",
        ".whl",
        "-r",
        "benchmarks/gpu.txt",
    )


@nox.session(name="train-playground")
def train_playground(session: nox.Session) -> None:
    """Train the playground's model from its seed, as it was trained for the package."""
    install(session, "--editable", ".[report]")
    session.run("python", "tools/train_playground.py", *session.posargs)


@nox.session(reuse_venv=False)
def package(session: nox.Session) -> None:
    """Build sdist and wheel, install the wheel into an empty environment and look at it from outside."""
    dist = Path(session.create_tmp()).resolve()
    for old in dist.glob("artaug-*"):
        old.unlink()
    shutil.rmtree(dist / "runs", ignore_errors=True)
    install(session, group="package")
    session.run("python", "-m", "build", "--outdir", str(dist))  # the wheel is built from the sdist
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    session.run("twine", "check", "--strict", str(wheel), str(sdist))
    tracked = str(session.run("git", "ls-files", external=True, silent=True, log=False)).split()
    with tarfile.open(sdist) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    if missing := sorted(set(tracked) - shipped):
        session.error(f"the sdist lacks what its own sessions need: {missing}")
    program, *_ = FENCE.findall(Path("README.md").read_text("utf-8"))
    install(session, f"{wheel}[optimizers,parquet,report,scale,vlm]")
    with session.chdir(dist):
        session.run("python", "-c", LOOK)
        session.run("python", "-c", program)  # README's first one, on the playground
        session.run("pyright", "--ignoreexternal", "--verifytypes", "artaug")


LOOK = """
import importlib.metadata, importlib.resources, re, artaug
root = importlib.resources.files("artaug")
assert "site-packages" in str(root), f"{root} is the checkout, not the wheel"
assert (root / "py.typed").is_file(), "the wheel has no py.typed"
weights = [path for path in root.joinpath("playground").rglob("*.safetensors")]
assert weights, "the wheel has no playground weights"
readme = importlib.metadata.metadata("artaug").get_payload()
assert "teach" in readme.lower() and not re.findall(r"\\]\\((?!https?:)", readme), "links that an index cannot follow"
print(f"artaug {artaug.__version__}: py.typed and {sum(path.stat().st_size for path in weights) / 2**20:.1f} MiB of weights")
"""


@nox.session(reuse_venv=False)
def constraints(session: nox.Session) -> None:
    """Resolve everything afresh, at the newest versions, and write constraints.txt."""
    session.install(
        ".[optimizers,parquet,report,scale,vlm]",
        *nox.project.dependency_groups(PYPROJECT, *PYPROJECT["dependency-groups"]),
    )
    frozen = session.run("python", "-m", "pip", "freeze", "--exclude", "artaug", silent=True)
    pins = "\n".join(line.partition("+")[0] for line in str(frozen).splitlines())
    Path("constraints.txt").write_text(f"{CONSTRAINTS_HEADER}{pins}\n", encoding="utf-8")


CONSTRAINTS_HEADER = """\
# The whole tested set. nox sessions install through it; `nox -s constraints` writes it anew.
# The pin of torch keeps machines without a GPU on the build CI uses.
"""
