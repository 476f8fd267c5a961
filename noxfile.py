"""Every task of a contributor, one command each: ``nox -s quick``, ``nox -s lint``; ``nox -l`` lists them.

A session makes its own virtual environment once and keeps it; ``nox -R -s quick`` goes straight to the command.
"""

from pathlib import Path

import nox

nox.options.sessions = ["quick", "lint"]
nox.options.reuse_existing_virtualenvs = True

CPP = [str(p) for top in ("csrc", "tests") for p in Path(top).rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]


def install(session: nox.Session, extras: str) -> None:
    session.install("-e", f".[{extras}]", env={"FASTVQ_EMULATED_TILES": "1"})


@nox.session
def quick(session: nox.Session) -> None:
    """The tests of a change in progress: under two minutes on two cores."""
    install(session, "test")
    session.run("pytest", "-n", "auto", "-m", "quick", *session.posargs)


@nox.session
def test(session: nox.Session) -> None:
    """All tests, as the README runs them."""
    install(session, "test")
    session.run("pytest", "-n", "auto", "--dist", "loadfile", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, clang-format, codespell and mypy; changes nothing."""
    install(session, "dev")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("clang-format", "--dry-run", "-Werror", *CPP)
    session.run("codespell")
    session.run("mypy")


@nox.session
def format(session: nox.Session) -> None:
    """Writes every file as the formatters want it."""
    session.install("-e", ".[dev]")
    session.run("ruff", "check", "--fix", ".")
    session.run("ruff", "format", ".")
    session.run("clang-format", "-i", *CPP)


@nox.session
def docs(session: nox.Session) -> None:
    """Builds the site in out/site, warnings as errors, then runs every code block and checks every link."""
    install(session, "docs,test")
    session.run("sphinx-build", "-q", "-W", "--keep-going", "docs", "out/site")
    session.run("pytest", "-q", "tests/test_readme.py", "tests/test_docs.py", *session.posargs)


@nox.session
def distribution(session: nox.Session) -> None:
    """The source distribution with its quick tests, and the wheel built from it, in empty environments."""
    session.run("bash", ".ci/distribution.sh", *session.posargs, external=True)


@nox.session
def bench(session: nox.Session) -> None:
    """The main benchmark; tables, plots and a picture go to out/."""
    install(session, "bench")
    session.run("python", "benchmarks/bench_quantize.py", *session.posargs)


@nox.session
def sanitize(session: nox.Session) -> None:
    """The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""
    install(session, "test")
    for kind in session.posargs or ("address", "undefined"):
        session.run("bash", "tests/run_sanitized.sh", kind, external=True)


@nox.session
def gpu(session: nox.Session) -> None:
    """Everything that needs a GPU: tests marked needs_gpu, then every op against its peers."""
    install(session, "bench,test")
    session.run("python", "benchmarks/gpu_report.py", *session.posargs)
