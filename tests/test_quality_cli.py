"""What a user can do wrong on the command line is answered in one line, with how to go on."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from unittest.mock import Mock

import pytest
from click.testing import CliRunner
from quality_tools import ONE_ARM, TINY

from benchmarks.lab import __main__ as lab
from benchmarks.lab.studies import STUDIES
from benchmarks.quality import cli, report, runner
from benchmarks.quality.catalogue import CATALOGUE
from benchmarks.quality.networks import PixelUNetSpec, UNetSpec
from benchmarks.quality.presets import PRESETS
from tests.helpers.commands import ROOT
from tests.helpers.commands import run as run_command


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Call the command line in an empty folder, with a tiny run for `digits`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "digits", replace(ONE_ARM, name="digits"))
    return lambda *arguments: CliRunner().invoke(cli.main, list(map(str, arguments)))


def is_one_line(said, line):
    assert said.exit_code == 1, said.output
    assert isinstance(said.exception, SystemExit)  # and not what was raised inside
    errors = [text for text in said.output.splitlines() if text.startswith("Error: ")]
    assert len(errors) == 1
    assert line in errors[0]


@pytest.mark.parametrize("preset", ["cifar10-wide-10k", "cifar10-16-flow"])
def test_a_data_set_that_needs_a_folder_says_which_and_leaves_none(call, tmp_path, preset):
    said = call("run", preset)
    is_one_line(said, "needs files; name their folder with --data: the folder")
    assert "Preparing" not in said.output
    is_one_line(call("run", preset, "--data", "nowhere"), "there is no folder nowhere")
    assert list(tmp_path.iterdir()) == []
    # That an empty one lacks all is found out in the run's own folder, which alone goes again.
    ours = tmp_path / "data"
    ours.mkdir()
    is_one_line(call("run", preset, "--data", ours, "--out", ours / "run"), "lacks data_batch_1")
    assert list(tmp_path.rglob("*")) == [ours]


def test_what_a_run_would_cost_is_said_without_its_data(call, tmp_path, monkeypatch):
    network = PixelUNetSpec(UNetSpec(8, (1,), blocks=1), fast=False)
    small = replace(ONE_ARM, name="cifar10-16", data="cifar10-16", network=network)
    monkeypatch.setitem(PRESETS, "cifar10-16", small)
    said = call("run", "cifar10-16", "--dry-run").output
    assert "networks to train    1, 12 network steps of 8 images" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("digit", "'digit' is not one of 'digits', "),
        ("digits --seeds 0,1,0", "expected each seed once, got '0,1,0'"),
        ("digits --seeds one", "expected numbers such as 0,1,2, got 'one'"),
    ],
)
def test_what_is_misspelt_is_named(call, given, said):
    found = call("run", *given.split())
    assert (found.exit_code, said in found.output) == (2, True)
    assert list(CATALOGUE) == list(PRESETS)


HELPS = [
    *("quality", "quality run", "quality search", "quality gpu", "quality keep"),
    *("lab", "lab run", "lab pairs", "monitor", "pages", "pages.tutorial"),
    *("overhead", "overhead run", "overhead gpu"),
]


@pytest.mark.parametrize("command", HELPS)
def test_help_is_there_at_once(command):
    """Without torch, which takes seconds to import."""
    options = f"-X importtime -m benchmarks.{command} --help".split()
    said = run_command(sys.executable, *options)
    assert f"Usage: python -m benchmarks.{command} " in said
    assert not re.search(r"\| +(torch|matplotlib|numpy)$", said, re.MULTILINE)


def test_a_run_says_what_it_left_and_that_it_is_complete(call, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "digits", replace(TINY, name="digits", seeds=(0,)))
    dry = call("run", "digits", "--dry-run").output
    assert "networks to train    2, 24 network steps" in dry
    assert "cells to measure     9, 22 network calls on 64 images each" in dry
    is_one_line(call("keep", "digits"), "no results in")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "file").touch()
    is_one_line(call("run", "digits", "--out", "file"), "out: expected a folder, and file is")
    is_one_line(call("run", "digits", "--out", "file/inside"), "Not a directory: 'file/inside'")

    _, _, after = call("run", "digits", "--workers", "1").output.partition("\nComplete after ")
    named = [line.split()[0] for line in after.splitlines() if line.startswith("  ")]
    assert named == list(report.FILES)
    assert set(named) <= {path.name for path in (tmp_path / "runs/digits").iterdir()}

    assert "runs/digits was complete already; only its report" in call("run", "digits").output
    assert "done already         100%" in call("run", "digits", "--dry-run").output
    assert call("keep", "digits").exit_code == 0
    assert (tmp_path / "benchmarks/results/quality/digits.json").exists()

    # What was made is not taken for the results of other settings.
    longer = replace(PRESETS["digits"].budget, steps=13)
    monkeypatch.setitem(PRESETS, "digits", replace(PRESETS["digits"], budget=longer))
    for said in (call("keep", "digits"), call("run", "digits", "--dry-run")):
        is_one_line(said, "holds results of other settings (budget)")


def test_ctrl_c_says_how_to_go_on(call, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "sample", Mock(side_effect=KeyboardInterrupt))
    said = call("run", "digits", "--seeds", "0", "--out", "a folder")
    assert said.exit_code == 130
    again = "`python -m benchmarks.quality run digits --out 'a folder' --seeds 0` goes on"
    assert again in said.output
    assert (tmp_path / "a folder/models/plain/seed0/weights.pt").exists()


def test_a_worker_that_dies_is_reported(call, monkeypatch):
    monkeypatch.setattr(runner, "ProcessPoolExecutor", Mock(side_effect=BrokenProcessPool))
    said = call("run", "digits", "--workers", "2")
    is_one_line(said, "a worker process died, perhaps for want of memory; what is done is kept")


WORKERS = """
import signal, sys
# Tests that a shell started in the background inherit a Ctrl-C that is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from dataclasses import replace
from benchmarks.quality import cli
from benchmarks.quality.presets import PRESETS
from quality_tools import ONE_ARM

if __name__ == "__main__":
    PRESETS["digits"] = replace(ONE_ARM, budget=replace(ONE_ARM.budget, steps=10**6))
    cli.main(["run", "digits", "--workers", "2", "--out", sys.argv[1]])
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_run(tmp_path, sent):
    """A job that would take hours is not waited for, and no process is left with its locks."""
    out, script = tmp_path / "out", tmp_path / "script.py"
    script.write_text(WORKERS)
    process = subprocess.Popen(  # noqa: S603 - ours
        [sys.executable, script, out],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"},
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        while not list(out.glob("models/plain/*/checkpoint.pt")):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.2)
        process.send_signal(sent)
        _, said = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert f"`python -m benchmarks.quality run digits --out {out}` goes on from there." in said
        assert "Traceback" not in said
    # Its session is empty as soon as Python's own helper has noticed; it runs into the test's
    # timeout where it never is.
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_the_labs_help_says_what_each_study_is():
    said = CliRunner().invoke(lab.main, ["--help"]).output
    assert list(lab.ABOUT) == list(STUDIES)
    for name, about in lab.ABOUT.items():
        assert f"  {name} " in said
        assert f" {about}\n" in said
