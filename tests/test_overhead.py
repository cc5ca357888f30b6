"""The overhead bench: its page is that of its figures, and a run touches nothing committed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks.overhead import __main__ as command
from benchmarks.overhead.contenders import contenders
from benchmarks.overhead.measure import gradient_error
from benchmarks.overhead.page import write_page

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((command.COMMITTED / "cpu.json").read_text(encoding="utf-8"))
    return found


def page_of(folder: Path, **devices: dict[str, Any]) -> str:
    for name, figures in devices.items():
        (folder / f"{name}.json").write_text(json.dumps(figures))
    write_page(folder, folder / "docs/overhead.md")
    return (folder / "docs/overhead.md").read_text(encoding="utf-8")


def test_the_committed_page_is_that_of_the_committed_figures(tmp_path: Path) -> None:
    write_page(command.COMMITTED, tmp_path / "overhead.md")
    written = (tmp_path / "overhead.md").read_text(encoding="utf-8")
    assert written == command.PAGE.read_text(encoding="utf-8"), "python -m benchmarks.overhead page"
    assert (tmp_path / "assets/overhead/cpu.svg").stat().st_size > 2000


def test_the_page_opens_with_the_answer_and_one_table(
    tmp_path: Path, committed: dict[str, Any]
) -> None:
    text = page_of(tmp_path, cpu=committed)
    step = committed["step"]["figures"]
    head = step["head"]["microseconds"]
    share = (head["expected"][1] - head["mse"][1]) / step["microseconds"]["mse"][1]
    answer = text.split("\n\n")[2]
    said = f"**Does the loss slow a training down? No: it adds {share:.2%} to a step"
    assert answer.startswith(said)
    table = text.split("\n\n")[3].splitlines()
    assert [row.split(" | ")[0] for row in table[2:]] == [
        "| CIFAR10", "| SD latents", "| CelebA", "| ADM-256", "| video latents",
    ]  # fmt: skip
    cell = next(c for c in committed["head"]["figures"] if c["name"] == "CIFAR10")
    seconds = cell["microseconds"]["expected"][1] / 1e6
    rate = 3 * 4 * 128 * 3 * 32 * 32 / seconds
    copy = committed["bandwidth"]["figures"]["copy_bytes_per_second"][1]
    assert f" | {rate / 1e9:.1f} | {rate / copy:.0%} | 1.00 | 0 |" in table[2]


def test_what_was_not_measured_has_no_column_and_one_sentence(
    tmp_path: Path, committed: dict[str, Any]
) -> None:
    text = page_of(tmp_path, cpu=committed)
    assert "not measured yet" not in text
    assert "| gradient error |" not in text
    said = [line for line in text.splitlines() if line.startswith("Not measured, and left out: ")]
    assert len(said) == 1
    for absent in ("on a GPU", "memory and syncs of CelebA, ADM-256 and video", "the gradient on"):
        assert absent in said[0]
    # As soon as it is measured, there is a column for it.
    figures = json.loads(json.dumps(committed))
    for row in figures["counts"]["figures"]:
        row["gradient_error"] = 2.5e-7
    text = page_of(tmp_path, cpu=figures)
    assert "| gradient error |" in text
    assert "| 2e-07 |" in text
    assert "the error of the gradient" not in text


def test_a_loss_that_costs_is_said_to_cost(tmp_path: Path, committed: dict[str, Any]) -> None:
    figures = json.loads(json.dumps(committed))
    figures["step"]["figures"]["head"]["microseconds"]["expected"] = [9e4, 1e5, 2e5]
    assert "slow a training down? Yes: it adds 9.8" in page_of(tmp_path, cpu=figures)


def test_without_figures_there_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no figures in"):
        write_page(tmp_path, tmp_path / "overhead.md")


def test_a_run_writes_to_runs_and_prints_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in command.COMMITTED.iterdir()}
    call = ["run", "--device", "cpu", "--seconds", "0.1", "--smallest", "8", "--largest", "10"]
    monkeypatch.setattr("benchmarks.overhead.levels.REAL_SHAPES", {"CIFAR10": (2, 3, 4, 4)})
    said = CliRunner().invoke(command.main, [*call, "--level", "head", "--level", "bandwidth"])
    assert said.exit_code == 0, said.output
    assert "{" not in said.output
    assert "| 2^8 | 64×4×1×1 | " in said.output
    assert "A copy moves " in said.output
    assert "Wrote runs/overhead/cpu.json." in said.output
    figures = json.loads((tmp_path / "runs/overhead/cpu.json").read_text())
    assert set(figures) == {"head", "bandwidth"}
    assert {path: path.read_bytes() for path in command.COMMITTED.iterdir()} == before


def test_keep_copies_figures_to_where_they_are_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "COMMITTED", tmp_path / "committed")
    said = CliRunner().invoke(command.main, ["keep"])
    assert said.exit_code == 1
    assert "Error: out: no figures in runs/overhead; measure them with" in said.output
    (tmp_path / "runs/overhead").mkdir(parents=True)
    (tmp_path / "runs/overhead/cpu.json").write_text("{}")
    assert CliRunner().invoke(command.main, ["keep"]).exit_code == 0
    assert (tmp_path / "committed/cpu.json").read_text() == "{}"


def test_a_size_in_full_that_is_not_measured() -> None:
    call = ["run", "--device", "cpu", "--smallest", "14", "--largest", "18", "--in-full", "20"]
    said = CliRunner().invoke(command.main, call)
    assert said.exit_code == 1
    assert said.output == "Error: in-full: expected sizes that are measured, 14, 16, 18, got 20\n"


def test_a_recorded_command_names_no_folder_of_one_machine() -> None:
    words = ["run", "--out", "here", "--level", "step", "--out=there"]
    assert command._without_out(words) == ["run", "--level", "step"]
    for path in command.COMMITTED.glob("*.json"):
        assert "--out" not in path.read_text(encoding="utf-8")


def test_both_measurements_of_the_head_are_in_the_answer() -> None:
    """On the GPU the head was timed at the step's shape twice, and each alone would settle it."""
    figures = json.loads((command.COMMITTED / "cuda.json").read_text(encoding="utf-8"))
    step = figures["step"]["figures"]
    heads = [step["head"]] + [c for c in figures["head"]["figures"] if c["name"] == "CIFAR10"]
    times = [head["microseconds"] for head in heads]
    added = sorted(time["expected"][1] - time["mse"][1] for time in times)
    shares = [f"{each / step['microseconds']['mse'][1]:.2%}" for each in added]
    assert f"Hardly: it adds {shares[0]} to {shares[1]} to a step" in command.PAGE.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    said = CliRunner().invoke(command.main, ["run", "--device", "cuda"])
    assert (said.exit_code, said.output) == (1, "Error: device: torch sees no GPU here\n")


def test_the_gradients_error_is_that_of_the_type() -> None:
    """Rounding to bfloat16, 8 bits, is at most 2^-8 of the largest entry; float32's far less."""
    noise, t = torch.randn(4, 3, 8, 8), torch.tensor([0, 9, 500, 999])
    eps_hat = torch.randn(4, 3, 8, 8)
    loss = contenders(CPU)["expected"]
    single = gradient_error(loss, (eps_hat, noise, t))
    half = gradient_error(loss, (eps_hat.bfloat16(), noise.bfloat16(), t))
    assert 0 < single < 1e-6
    assert 1e-4 < half <= 2**-8
    wrong = gradient_error(
        lambda e, n, t: loss(e, n, t) * (1.01 if e.dtype == torch.float32 else 1),
        (eps_hat, noise, t),
    )
    assert wrong == pytest.approx(0.01, rel=1e-3)
