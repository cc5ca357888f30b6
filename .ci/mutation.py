"""Mutation testing: change one operator or number of a module at a time, and see that a test fails.

    python .ci/mutation.py [module ...] [--line TEXT] [--sample N] [--jobs N]

Cosmic Ray makes the mutants. It would start Python anew for each, and import torch; here each is a
fork of one process that has imported all but the library. `mutation.toml` says which mutants are
made, which tests are to notice them, and which are equal to the original.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import re
import resource
import sys
import tempfile
from collections import Counter
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # of several, a fork would have one
os.environ["HYPOTHESIS_PROFILE"] = "mutation"

import pytest
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.config import load_config
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).parents[1]
GOAL = 0.95
SECONDS = 60  # of CPU, for a mutant that runs for ever
MEMORY = 2**34  # bytes of addresses, for one that asks for a tensor without end


class Place(NamedTuple):
    """The occurrence of an operator of Cosmic Ray in a module, and the line where it stands."""

    operator: str
    occurrence: int
    line: str


class Mutant(NamedTuple):
    """A changed module, by the one line that differs."""

    code: str
    number: int
    before: str
    after: str


def places_in(source: str, exclude: list[str]) -> list[Place]:
    """Find all that can be changed, but by operators that match `exclude`."""
    nodes = list(ast_nodes(get_ast(source)))
    lines = source.splitlines()
    places = []
    for name in plugins.operator_names():
        operator = plugins.get_operator(name)
        if operator.arguments() or any(re.search(pattern, name) for pattern in exclude):
            continue
        positions = (where for node in nodes for where in operator().mutation_positions(node))
        places += [Place(name, i, lines[start[0] - 1]) for i, (start, _) in enumerate(positions)]
    return places


def mutant_at(source: str, place: Place) -> Mutant | None:
    """Change one place; None where that is no Python, such as for a star that is no operator."""
    code = mutate_code(source, plugins.get_operator(place.operator)(), place.occurrence)
    try:
        compile(code, place.operator, "exec", dont_inherit=True)
    except SyntaxError:
        return None
    lines = enumerate(zip(source.splitlines(), code.splitlines(), strict=False), start=1)
    number, (before, after) = next((i, pair) for i, pair in lines if pair[0] != pair[1])
    return Mutant(code, number, before.strip(), after.strip())


def preload(files: set[str]) -> None:
    """Import all that the tests import, and forget what is ours: a fork imports that anew."""
    pytest.main(["--collect-only", "-qqq", *sorted(files)])
    ours = {"s2dm_loss", "benchmarks", "tests", *(path.stem for path in (ROOT / "tests").iterdir())}
    for name in list(sys.modules):
        if name.partition(".")[0] in ours:
            del sys.modules[name]
    sys.stdout.flush()
    gc.freeze()  # as pytest ends it collects garbage five times over


def say(text: str) -> None:
    """Write at once: what a fork finds unwritten, it writes again."""
    sys.stdout.write(text)
    sys.stdout.flush()


def start(module: str, code: str | None, tests: list[str], skip: str) -> int:
    """Run the tests in a fork where the module has another code, and return the fork's id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = _test(module, code, tests, skip)
        finally:
            os._exit(status)
    return child


def _test(module: str, code: str | None, tests: list[str], skip: str) -> int:
    if code is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        with tempfile.TemporaryFile() as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        load = SourceFileLoader.get_code

        def get_code(self: SourceFileLoader, fullname: str) -> Any:
            if fullname == module:
                return compile(code, self.path, "exec", dont_inherit=True)
            return load(self, fullname)

        SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    for file in tests:  # one after the other: most mutants fail in the first
        options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-k", f"not ({skip})"]
        status = pytest.main([*options, file])
        if status != pytest.ExitCode.OK:
            return 1
    return 0


def score(name: str, config: Any, line: str, sample: int | None, jobs: int) -> float:
    """Test every mutant of one module; return the share that was noticed of those to be noticed."""
    how = f"s2dm_loss.{name}", config["tests"][name], " or ".join(config["skip"])
    _, status = os.waitpid(start(how[0], None, *how[1:]), 0)
    if status:
        raise SystemExit(f"{name}: its tests fail as it is")
    path = ROOT / "s2dm_loss" / f"{name.replace('.', '/')}.py"
    source = path.read_text(encoding="utf-8")
    equal = {row["line"] for row in config["equal"] if row["module"] == name}
    count: Counter[str] = Counter()
    running: dict[int, Mutant] = {}

    def finish_one() -> None:
        child, status = os.wait()
        mutant = running.pop(child)
        count["killed" if status else "survived"] += 1
        if not status:
            say(f"{name}.py:{mutant.number}\n  - {mutant.before}\n  + {mutant.after}\n")

    places = [p for p in places_in(source, config["exclude-operators"]) if line in p.line]
    random.Random(0).shuffle(places)  # noqa: S311 - the same sample each time
    for place in places[:sample]:
        mutant = mutant_at(source, place)
        if mutant is None:
            continue
        if {mutant.before, mutant.after} & equal:
            count["equal"] += 1
            continue
        running[start(how[0], mutant.code, *how[1:])] = mutant
        if len(running) == jobs:
            finish_one()
    while running:
        finish_one()
    share = count["killed"] / max(count["killed"] + count["survived"], 1)
    say(f"{name}: {dict(count)}, {share:.1%} killed\n")
    return share


def main() -> None:
    """Print the survivors of each module and its score; fail below the goal."""
    config: Any = load_config(ROOT / ".ci" / "mutation.toml")
    parser = argparse.ArgumentParser()
    parser.add_argument("modules", nargs="*", metavar="module", help="such as coefficients")
    parser.add_argument("--line", default="", help="only mutants of lines that contain this")
    parser.add_argument("--sample", type=int, help="only so many of each module, drawn at random")
    parser.add_argument("--jobs", type=int, default=1, help="mutants tested at once")
    options = parser.parse_args()
    os.chdir(ROOT)
    names = options.modules or list(config["tests"])
    preload({file for name in names for file in config["tests"][name]})
    limits = options.line, options.sample, options.jobs
    shares = [score(name, config, *limits) for name in names]
    raise SystemExit(min(shares) < GOAL)


if __name__ == "__main__":
    main()
