"""The checks in fresh environments, over the versions that pyproject.toml claims.

`nox -l` lists them. `nox` runs those that need nothing but the interpreter it runs on.
"""

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.4"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "docs", "wheel"]
nox.options.error_on_missing_interpreters = True

PYTHONS = nox.project.python_versions(nox.project.load_toml("pyproject.toml"))
# The floors of pyproject.toml's dependencies; a test holds the two equal.
OLDEST = ("torch==2.4.0", "einops==0.8.0", "typing-extensions==4.8.0", "numpy==1.26.4")
OLDEST_PYTHON = PYTHONS[0]
# The tests that need no trainer and no part of benchmarks/.
CORE = (
    *("coefficients", "corrections", "errors", "fuzz", "golden", "head", "loss", "numerics"),
    *("paths", "prediction", "public_api", "rows", "schedule", "scaled_model"),
    *("search", "search_frechet", "skip_set", "tables", "testing", "timesteps", "tracing"),
    "weighting",
)
ALL = ("-m", "")  # the slow tests too
TEST_TOOLS = ("hypothesis", "pytest", "pytest-timeout", "pytest-xdist")
# Exact versions of everything, as the repository was last tested.
PINNED = ("-c", "constraints.txt") if Path("constraints.txt").is_file() else ()


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Everything, with the newest of all dependencies."""
    session.install("-e", ".[test]")
    session.run("pytest", "-n", "auto", *ALL, *session.posargs)


@nox.session(python=OLDEST_PYTHON)
def oldest(session: nox.Session) -> None:
    """The core, with the oldest of its dependencies. The trainers' own floors are higher."""
    session.install(*OLDEST, *TEST_TOOLS)
    session.install("--no-deps", "-e", ".")
    _test_core(session, *ALL)


@nox.session
def core(session: nox.Session) -> None:
    """The core with exact versions, on any Python: `nox -s core -P python3.13`."""
    session.install(*PINNED, "-e", ".", "numpy", *TEST_TOOLS)
    _test_core(session)


def _test_core(session: nox.Session, *marks: str) -> None:
    files = [f"tests/test_{name}.py" for name in CORE]
    doctests = ["s2dm_loss", "--ignore=s2dm_loss/adapters"]
    session.run("pytest", "-n", "auto", *marks, *files, *doctests, *session.posargs)


@nox.session
def trainers(session: nox.Session) -> None:
    """Trainers on PyPI: their own code in place of the doubles."""
    session.install(*PINNED, "-e", ".[test]")
    folder = Path(session.create_tmp()) / "trainers"
    shutil.rmtree(folder, ignore_errors=True)
    session.install("--no-deps", "--target", str(folder), "-r", ".ci/trainers.txt")
    names = ("S2DM_K_DIFFUSION_ROOT", "S2DM_DENOISING_DIFFUSION_PYTORCH_ROOT")
    files = (
        *("adapters", "adapter_more_trainers", "weighting_trainers"),
        "adapter_denoising_diffusion_pytorch",
    )
    session.run(
        "pytest",
        *("-n", "auto", *ALL),
        *(f"tests/test_{name}.py" for name in files),
        *session.posargs,
        env=dict.fromkeys(names, str(folder)),
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Lint and format."""
    session.install(*PINNED, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types inside the library, and what a user's type checker sees of the public names."""
    session.install(*PINNED, "-e", ".[dev]")
    session.run("mypy")
    session.run("pytest", *ALL, "tests/test_wheel.py", "-k", "type_checker", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site and look at it in the system's Chromium."""
    session.install(*PINNED, "-e", ".[dev]")
    session.run("mkdocs", "build", "--strict")
    session.run("pytest", *ALL, "tests/test_site.py", *session.posargs)


@nox.session
def mutation(session: nox.Session) -> None:
    """Break the mathematics, one small change at a time, and see that a test notices each.

    For some modules only, and side by side: `nox -s mutation -- coefficients --jobs 4`.
    """
    session.install(*PINNED, "-e", ".[test]", "cosmic-ray==8.7.0")
    session.run("python", ".ci/mutation.py", *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build, check, install away from the checkout, and run the tests against what is installed."""
    dist = Path(session.create_tmp()) / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.install(*PINNED, "build", "twine")
    session.run("python", "-m", "build", "--outdir", str(dist), ".")
    session.run("twine", "check", "--strict", *map(str, dist.iterdir()))

    (built,) = dist.glob("*.whl")
    session.install(*PINNED, f"s2dm-loss[test] @ {built.resolve().as_uri()}")
    # What the tests and the pages' blocks need, without the sources of the library.
    away = Path(session.create_tmp()) / "away"
    shutil.rmtree(away, ignore_errors=True)
    for name in ("tests", "docs", "benchmarks", ".ci"):
        shutil.copytree(name, away / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff"):
        shutil.copy(name, away)
    session.chdir(away)
    where = "import s2dm_loss; assert 'site-packages' in s2dm_loss.__file__, s2dm_loss.__file__"
    session.run("python", "-c", where)
    session.run("pytest", "-n", "auto", *ALL, "tests", "--pyargs", "s2dm_loss", *session.posargs)
