"""Runs get numbers of their own, also when they begin at the same moment, and do not share a folder."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from training.run_folder import RunLock, find_run_dirs, make_run_dir

LOCKED = """
import sys
from training.run_folder import RunLock
lock = RunLock(sys.argv[1])
print("locked", flush=True)
sys.stdin.read()
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_make_run_dir_counts_on_from_the_largest_number(tmp_path):
    outdir = tmp_path / "new" / "runs"
    assert make_run_dir(outdir, "a").name == "00000-a"
    (outdir / "00041-b").mkdir()
    (outdir / "notes.txt").touch()
    (outdir / "123-short").mkdir()
    assert make_run_dir(outdir, "a-b.c").name == "00042-a-b.c"
    (outdir / "100000-b").mkdir()
    assert make_run_dir(outdir, "b").name == "100001-b"


def test_make_run_dir_passes_over_a_number_that_a_killed_process_claimed(tmp_path):
    (tmp_path / ".00003.claim").mkdir()
    assert make_run_dir(tmp_path, "a").name == "00004-a"


def test_make_run_dir_at_the_same_moment_gives_everyone_another_number(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: make_run_dir(tmp_path, f"run{i % 3}"), range(40)))
    numbers = [path.name.split("-")[0] for path in made]
    assert len(set(numbers)) == 40
    assert names(tmp_path) == sorted(path.name for path in made)  # no claims are left


@pytest.mark.parametrize("name", ["", "a/b", "/abs"])
def test_make_run_dir_of_no_folder_name_raises(tmp_path, name):
    with pytest.raises(ValueError, match="run name: expected the name of a folder"):
        make_run_dir(tmp_path, name)


def test_find_run_dir_is_the_last_of_exactly_this_name(tmp_path):
    for name in ("00002-a", "00010-a", "00011-a-b", "00012-b"):
        (tmp_path / name).mkdir()
    (tmp_path / "00099-a").touch()
    assert find_run_dirs(tmp_path, "a")[0] == tmp_path / "00010-a"
    assert find_run_dirs(tmp_path, "c") == []
    assert find_run_dirs(tmp_path / "absent", "a") == []


def test_run_lock_keeps_other_processes_out_until_it_ends(tmp_path, repo_root):
    pytest.importorskip("fcntl")
    command = [sys.executable, "-c", LOCKED, str(tmp_path)]
    other = subprocess.Popen(command, cwd=repo_root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(OSError, match=f"{tmp_path}: another process trains in this folder"):
            RunLock(tmp_path)
    finally:
        other.kill()
        other.wait()
    RunLock(tmp_path).release()
    assert subprocess.run(command, cwd=repo_root, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode == 0
