"""Kills, a full disk, a damaged checkpoint, a second process: nothing good is lost."""

import os
import pickle
import shutil
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock
from quality_tools import KILLED, ONE_ARM, stopped_at, what_was_made

from benchmarks import files
from benchmarks.files import load_json, load_tensors, save_tensors
from benchmarks.quality import cli, training
from benchmarks.quality.checkpoint import BEFORE, NEWEST, newest_state, save_state
from benchmarks.quality.plan import plan
from benchmarks.quality.presets import PRESETS
from benchmarks.quality.runner import run
from tests.helpers.commands import ROOT
from tests.helpers.commands import run as run_command

TESTS = str(ROOT / "tests")
# One process imports everything once and forks a run for every kill.
KILLER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)  # the order of a sum depends on it, and a fork wants no other threads
from pathlib import Path
from benchmarks.quality import data, plan, runner
from quality_tools import KILLED

data.load(KILLED.data)  # imports what it needs once, and not in every fork
out, draw, kills, done = Path(sys.argv[1]), random.Random(0), 0, 0

def fork():
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        runner.run(KILLED, out / str(done))
        os._exit(0)
    return child

began = time.perf_counter()
if os.waitpid(fork(), 0)[1] != 0:
    sys.exit("a run failed")
whole = time.perf_counter() - began
while kills < int(sys.argv[2]):
    done += plan.plan(KILLED, out / str(done)).cost == 0
    child = fork()
    time.sleep(draw.uniform(0, whole / 2))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    kills += os.WIFSIGNALED(status)
    if not os.WIFSIGNALED(status) and status != 0:
        sys.exit("a run failed")
# Once more in every folder: a run may have been killed when all was there, but not tidied up.
for done in range(done + 1):
    if os.waitpid(fork(), 0)[1] != 0:
        sys.exit("a run failed")
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_killed_at_twenty_random_moments_makes_the_same(tmp_path):
    run_command(sys.executable, "-c", KILLER, tmp_path, 20, PYTHONPATH=TESTS)
    first, *killed = sorted(tmp_path.iterdir(), key=lambda path: int(path.name))
    whole = what_was_made(KILLED, first)  # of the run that nobody killed
    assert [sum(name.endswith(end) for name in whole) for end in ("weights.pt", ".json")] == [2, 4]
    assert killed
    for root in killed:
        assert what_was_made(KILLED, root) == whole
        for left in ("**/.partial*", "**/checkpoint*", "cells/*/*/*/"):
            assert not list(root.glob(left))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of ONE_ARM that nobody stopped."""
    root = tmp_path_factory.mktemp("whole")
    run(ONE_ARM, root)
    return root


@pytest.mark.parametrize("damaged", [lambda whole: whole[: len(whole) // 2], lambda _: b""])
def test_a_damaged_checkpoint_costs_steps_since_the_one_before(damaged, whole, tmp_path, capsys):
    folder = stopped_at(ONE_ARM, tmp_path, 10)
    newest, before = folder / NEWEST, folder / BEFORE
    newest.write_bytes(damaged(newest.read_bytes()))
    assert plan(ONE_ARM, tmp_path).network_steps == 12 - 5
    run(ONE_ARM, tmp_path)
    assert f"Going on from {before}, step 5." in capsys.readouterr().out
    assert what_was_made(ONE_ARM, tmp_path) == what_was_made(ONE_ARM, whole)
    assert not list(folder.glob("checkpoint*"))


def error_of(root):
    """What the command line says of a run of ONE_ARM that cannot be."""
    with mock.patch.dict(PRESETS, digits=ONE_ARM):
        said = CliRunner().invoke(cli.main, ["run", "digits", "--out", str(root)])
    assert said.exit_code == 1
    assert "Traceback" not in said.output
    return said.output


def test_without_a_checkpoint_that_can_be_read_the_user_is_told(tmp_path):
    folder = stopped_at(ONE_ARM, tmp_path, 5)
    (folder / NEWEST).write_bytes(b"nothing")
    assert f"Error: {folder / NEWEST} cannot be read (" in error_of(tmp_path)


FULL = """
import resource, signal, sys
from benchmarks.quality import cli
from benchmarks.quality.presets import PRESETS
from quality_tools import ONE_ARM
PRESETS["digits"] = ONE_ARM
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
cli.main(["run", "digits", "--workers", "1", "--out", sys.argv[1]])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs limits on the size of files")
def test_a_full_disk_ends_a_run_in_one_line_and_keeps_the_last_good_state(whole, tmp_path):
    """A limit on the size of files stands for the disk: a checkpoint no longer fits."""
    folder = stopped_at(ONE_ARM, tmp_path, 5)
    good = (folder / NEWEST).read_bytes()
    with pytest.raises(AssertionError) as error:
        run_command(sys.executable, "-c", FULL, tmp_path, len(good) // 2, PYTHONPATH=TESTS)
    said = str(error.value)
    assert f"\nError: cannot write {folder / NEWEST}: " in said
    assert f"`python -m benchmarks.quality run digits --out {tmp_path}` goes on" in said
    assert "Traceback" not in said
    assert (folder / NEWEST).read_bytes() == good
    assert not list(tmp_path.rglob(".partial*"))
    run(ONE_ARM, tmp_path)  # once there is room
    assert what_was_made(ONE_ARM, tmp_path) == what_was_made(ONE_ARM, whole)


def test_torchs_own_complaint_about_the_disk_is_an_oserror(tmp_path, monkeypatch):
    save_tensors(tmp_path / "a.pt", {"x": torch.zeros(1)})

    def full(content, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nat")

    monkeypatch.setattr(files.torch, "save", full)
    for name, said in (("a", "write failed; the one that was"), ("b", "nothing was written")):
        with pytest.raises(OSError, match=rf"cannot write .*{name}\.pt: Pytorch.*{said}"):
            save_tensors(tmp_path / f"{name}.pt", {"x": torch.ones(1)})
    assert load_tensors(tmp_path / "a.pt")["x"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_second_process_in_the_folder_is_told_and_changes_nothing(tmp_path):
    def contents():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    stopped_at(ONE_ARM, tmp_path, 5)
    before = contents()
    with FileLock(tmp_path / "lock"):
        assert "Error: out: another run is at work in" in error_of(tmp_path)
    assert contents() == before


class Harmful:
    def __reduce__(self):
        return (print, ("a checkpoint ran code",))


def test_a_checkpoint_runs_no_code_and_a_damaged_file_is_named(tmp_path, capsys):
    for save in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))):
        save({"step": 1, "model": Harmful()}, tmp_path / NEWEST)
        with pytest.raises(ValueError, match="cannot be read"):
            newest_state(tmp_path)
    assert "ran code" not in capsys.readouterr().out
    (tmp_path / "a.json").write_text('{"x": ')
    with pytest.raises(ValueError, match=r"a\.json cannot be read"):
        load_json(tmp_path / "a.json")


def test_a_run_killed_just_before_it_tidied_up_is_tidied_up(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    cells, checkpoint = tmp_path / "cells/plain/seed0", tmp_path / "models/plain/seed0" / NEWEST
    checkpoint.write_bytes(b"left")
    (cells / "ddim-2").mkdir()
    (cells / "ddim-2/0.pt").write_bytes(b"left")
    (cells / "deis-2.json").unlink()
    run(ONE_ARM, tmp_path)
    assert not checkpoint.exists()
    assert not (cells / "ddim-2").exists()
    assert (cells / "ddim-2.json").exists()


def test_two_checkpoints_are_kept(tmp_path):
    assert newest_state(tmp_path) is None
    for step in (1, 2, 3):
        save_state(tmp_path, {"step": step})
    (tmp_path / NEWEST).unlink()  # killed between the two renames
    assert newest_state(tmp_path)["step"] == 2


def test_a_full_disk_between_checkpoint_and_kept_state_costs_nothing(tmp_path):
    """What a run goes on from must not lie behind what it still has to keep."""
    budget = replace(ONE_ARM.budget, steps=10, checkpoint_every=5, keep_at=(0.5,))
    preset = replace(ONE_ARM, budget=budget)
    full = mock.patch.object(training, "save_tensors", side_effect=OSError("no space left"))
    with full, pytest.raises(OSError, match="no space left"):
        run(preset, tmp_path)
    run(preset, tmp_path)
    folder = tmp_path / "models/plain/seed0"
    assert load_tensors(folder / "state-50.pt")["step"] == 5
    assert (folder / "weights.pt").exists()
