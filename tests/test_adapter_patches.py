"""The patches beside the pages: they say what the pages say, and `git apply` takes them."""

import shutil
import subprocess

import pytest

from tests.helpers.patches import (
    FOLDER,
    PATCHES,
    TRAINERS,
    changed,
    lines_of_file,
    lines_of_page,
    make,
)
from tests.helpers.upstream import root_of


def ids(patch):
    return patch.file.stem


@pytest.mark.parametrize("patch", PATCHES, ids=ids)
def test_a_patch_changes_the_lines_that_its_page_shows(patch):
    assert lines_of_file(patch) == lines_of_page(patch)


def test_every_patch_is_known_and_every_page_links_to_its_own():
    assert {path.name for path in FOLDER.glob("*.patch")} == {p.file.name for p in PATCHES}
    for patch in PATCHES:
        page = (FOLDER.parent / patch.page).read_text(encoding="utf-8")
        assert f"](patches/{patch.file.name})" in page, patch.file.name


@pytest.mark.parametrize("patch", PATCHES, ids=ids)
def test_a_patch_names_the_commit_that_its_page_was_tested_on(patch):
    trainer = TRAINERS[patch.trainer]
    head = patch.file.read_text(encoding="utf-8").splitlines()[0]
    assert head == f"s2dm-loss for {trainer.repository} at {trainer.commit}"
    page = (FOLDER.parent / patch.page).read_text(encoding="utf-8")
    assert trainer.commit[:7] in page


@pytest.mark.parametrize("patch", PATCHES, ids=ids)
def test_git_applies_a_patch_to_the_trainers_file(patch, tmp_path):
    root = root_of(TRAINERS[patch.trainer].variable)
    source = (root / patch.path).read_text(encoding="utf-8")
    file = tmp_path / patch.path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source, encoding="utf-8")
    git = shutil.which("git")
    if git is None:
        pytest.skip("git is not installed")
    command = [git, "apply", "--verbose", str(patch.file)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)  # noqa: S603
    result = file.read_text(encoding="utf-8")
    assert result == changed(patch, source)
    compile(result, patch.path, "exec")
    assert make(patch, root) == patch.file.read_text(encoding="utf-8")
