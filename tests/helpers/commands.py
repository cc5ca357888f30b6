"""Commands of ours, which have to end well."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command, cwd=ROOT, **environment):
    """Return what a command prints, on either stream."""
    done = subprocess.run(  # noqa: S603 - our own commands
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
