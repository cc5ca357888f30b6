"""What is released: an sdist and the wheel built from it, and what they install."""

import os
import re
import shutil
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from s2dm_loss import __version__
from tests.helpers.commands import ROOT, run

pytest.importorskip("build")
pytestmark = pytest.mark.skipif(not (ROOT / "s2dm_loss").is_dir(), reason="no sources beside these")


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Build from a copy, so that nothing is left in the checkout; the wheel from the sdist."""
    source = tmp_path_factory.mktemp("source") / "checkout"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ".", cwd=source)
    return out


@pytest.fixture(scope="module")
def wheel(dist):
    return next(dist.glob("*.whl"))


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    folders = (ROOT / "s2dm_loss" / name for name in (".", "sampling", "adapters"))
    files = {path.relative_to(ROOT).as_posix() for one in folders for path in one.glob("*.py")}
    assert names == files | {"s2dm_loss/py.typed"}


def test_the_sdist_holds_the_library_and_its_licence(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "README.md", "pyproject.toml", "setup.py", "CHANGELOG.md", "CITATION.cff"}
    assert wanted | {"s2dm_loss/py.typed", "adapters/__init__.py", "s2dm_loss/loss.py"} <= names
    assert not any(name.startswith(("tests", "docs", "benchmarks")) for name in names)


def metadata_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        return archive.read(name).decode()


def test_no_link_of_the_readme_is_dead_on_an_index(wheel):
    """An index has the text alone: no file beside it, and no anchors at its headings."""
    head, _, description = metadata_of(wheel).partition("\n\n")
    assert "Description-Content-Type: text/markdown" in head
    links = re.findall(r"(?:\]\(|src=\"|href=\")([^\")]*)", description)
    assert links
    assert [link for link in links if not link.startswith("https://")] == []
    assert "CorrectionSearch recommend which correction" in re.sub(r"\W+", " ", description)


def test_the_metadata_render_and_say_what_pyproject_says(dist, wheel):
    pytest.importorskip("twine")
    run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir(), cwd=dist)
    metadata = metadata_of(wheel)
    assert f"\nVersion: {__version__}\n" in metadata
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.M)
    assert sorted(required) == ["einops", "torch", "typing-extensions"]


def pyright(python, *arguments, cwd):
    """It asks the first python of the PATH, and does not see editable installs: hence `python`."""
    pytest.importorskip("pyright")
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    return run(sys.executable, "-m", "pyright", *arguments, cwd=cwd, PATH=path)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel alone in a new environment, beside the dependencies of this one."""
    root = tmp_path_factory.mktemp("installed")
    venv.create(root / "env", with_pip=False)
    python = root / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    find = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(run(python, "-c", find, cwd=root).strip())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site_packages)  # noqa: S202 - built above
    # A plain path: the .pth files in it, the editable install's among them, are not read.
    dependencies = Path(torch.__file__).parents[1]
    (site_packages / "dependencies.pth").write_text(str(dependencies))
    return python, site_packages


USE = """
import importlib.util, torch, s2dm_loss.adapters
assert importlib.util.find_spec("adapters") is None
criterion = s2dm_loss.SkipStepLoss(s2dm_loss.NoiseSchedule.linear(1000), skip_set=9)
assert criterion(lambda x_t, t: 0 * x_t, torch.randn(2, 3)).isfinite()
print(s2dm_loss.__file__, s2dm_loss.adapters.__file__, sep="\\n", end="")
"""


def test_the_wheel_works_away_from_the_checkout(installed, tmp_path):
    python, folder = installed
    printed = run(python, "-W", "error", "-c", USE, cwd=tmp_path).split("\n")
    assert [Path(line).is_relative_to(folder) for line in printed] == [True, True]


def test_a_type_checker_sees_what_a_call_returns(installed, tmp_path):
    """A tensor, with no `Any` on the way; and the options by name."""
    program = tmp_path / "program.py"
    program.write_text(
        """# pyright: reportUnnecessaryTypeIgnoreComment=true
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from s2dm_loss import NoiseSchedule, SkipStepLoss, gain
from s2dm_loss.loss import RegressionTarget

criterion = SkipStepLoss(NoiseSchedule.linear(1000), 49, prediction_type="v_prediction")
x, t = torch.randn(2, 3), torch.tensor([3, 500])
assert_type(criterion(nn.Identity(), x), Tensor)
assert_type(criterion.from_output(x, x, t, x), Tensor)
assert_type(criterion.regression_target(x, t, x), RegressionTarget)
assert_type(gain(NoiseSchedule.linear(1000), 49, max_c2=4.0), Tensor)
SkipStepLoss(NoiseSchedule.linear(1000), 49, prediction_type="v")  # type: ignore[arg-type]
gain(NoiseSchedule.linear(1000), 49, bound=4.0)  # type: ignore[call-arg]
"""
    )
    assert "0 errors" in pyright(installed[0], program, cwd=tmp_path)


def test_a_type_checker_knows_every_public_name(installed):
    python, folder = installed
    report = pyright(python, "--verifytypes", "s2dm_loss", "--ignoreexternal", cwd=folder.parent)
    assert "Type completeness score: 100%" in report
    assert re.search(r'Symbols exported by "s2dm_loss": [1-9]', report)  # zero are complete too
