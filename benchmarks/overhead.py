"""What the loss costs, on a CPU or a GPU: `python -m benchmarks.overhead run`.

Losses on identical tensors, in one process, in turn; the figures go to
`benchmarks/results/overhead/DEVICE.json`, and `docs/overhead.md` with its plots is written from
those files, whatever machine they came from.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks._overhead.levels import LEVELS, Settings
from benchmarks._overhead.page import write_page

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "overhead"
PAGE = ROOT / "docs" / "overhead.md"
SOURCES = ("s2dm_loss/*.py", "benchmarks/overhead.py", "benchmarks/_overhead")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@click.group(help=__doc__)
def main() -> None:
    """Group the commands."""


@main.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[cuda where there is one]")
@click.option("--level", "levels", type=click.Choice(list(LEVELS)), multiple=True, help="[all]")
@click.option("--seconds", default=2.0, show_default=True, help="Time for each cell of a table.")
@click.option("--smallest", default=14, show_default=True, help="log2 of the smallest size; even.")
@click.option("--largest", type=int, help="log2 of the largest size [26; 28 on a GPU].")
@click.option("--step-batch", type=int, help="Batch of the training step [4; 128 on a GPU].")
@click.option("--step-seconds", default=60.0, show_default=True, help="Time for that step.")
@click.option("--threads", type=int, help="CPU threads of torch [its own choice].")
@click.option(
    "--clock",
    type=click.Choice(list(CLOCKS)),
    default="wall",
    show_default=True,
    help="What times a CPU. CPU time, with one thread, is for a machine that does other work.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=RESULTS, help="[benchmarks/results/overhead]"
)
def run(
    device: str | None,
    levels: tuple[str, ...],
    seconds: float,
    smallest: int,
    largest: int | None,
    step_batch: int | None,
    step_seconds: float,
    threads: int | None,
    clock: str,
    out: Path,
) -> None:
    """Measure, and write the figures; a level measured before is replaced."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    on_gpu = name == "cuda"
    settings = Settings(
        device=torch.device(name),
        seconds=seconds,
        smallest=smallest,
        largest=largest or (28 if on_gpu else 26),
        step_batch=step_batch or (128 if on_gpu else 4),
        step_seconds=step_seconds,
        # Several times the last cache of either: 32 MiB here, 50 MiB on an H100.
        cache_bytes=256 * 2**20,
        clock=CLOCKS[clock],
    )
    path = out / f"{name}.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for level in levels or tuple(LEVELS):
        click.echo(f"== {level}", err=True)
        load_before, began = os.getloadavg(), time.time()
        figures = LEVELS[level](settings)
        results[level] = {
            "machine": machine(settings.device),
            "command": shlex.join(["python", "-m", "benchmarks.overhead", *sys.argv[1:]]),
            "commit": _git("rev-parse", "HEAD"),
            "local_changes": bool(_git("status", "--porcelain", "--", *SOURCES)),
            "clock": "CUDA events" if on_gpu else clock,
            "seconds": round(time.time() - began, 1),
            # Above 0 before: something else was running.
            "load_average_before": round(load_before[0], 2),
            "load_average_after": round(os.getloadavg()[0], 2),
            "figures": figures,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@main.command()
def page() -> None:
    """Write docs/overhead.md and the plots from the figures at hand."""
    write_page(RESULTS, PAGE)


def machine(device: torch.device) -> dict[str, Any]:
    """Say what the figures were measured on."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
        }
    return facts


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    return _output("git", "-C", str(ROOT), *arguments)


def _output(*command: str) -> str:
    """Return what a command prints, or nothing where there is no such command."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


if __name__ == "__main__":
    main()
