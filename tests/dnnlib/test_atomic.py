"""Files appear whole or not at all."""

import os
import stat
import threading

import pytest

from dnnlib.util import atomic_path, atomic_write


def names(directory):
    return sorted(entry.name for entry in directory.iterdir())


def test_atomic_write_success_writes_the_file_alone(tmp_path):
    with atomic_write(tmp_path / "a" / "b.bin") as file:
        file.write(b"whole")
        assert names(tmp_path / "a") != ["b.bin"]
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"whole"
    assert names(tmp_path / "a") == ["b.bin"]


def test_atomic_write_text_mode_passes_the_encoding_on(tmp_path):
    with atomic_write(tmp_path / "a.txt", "w", encoding="utf-16") as file:
        file.write("ä")
    assert (tmp_path / "a.txt").read_text(encoding="utf-16") == "ä"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_atomic_write_exception_keeps_the_old_file(tmp_path, error):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(error), atomic_write(target) as file:
        file.write(b"new")
        raise error
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_atomic_write_disk_refuses_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError), atomic_write(tmp_path / "a.bin") as file:
            file.write(bytes(4 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


def test_atomic_write_fsync_fails_leaves_nothing(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"), atomic_write(tmp_path / "a.bin") as file:
        file.write(b"lost")
    assert names(tmp_path) == []


def test_atomic_write_body_closes_file_still_appears(tmp_path):
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"whole")
        file.close()
    assert (tmp_path / "a.bin").read_bytes() == b"whole"


@pytest.mark.parametrize("mode", ["ab", "r+b", "x"])
def test_atomic_write_other_mode_raises_value_error(tmp_path, mode):
    with pytest.raises(ValueError, match="expected 'w' or 'wb'"), atomic_write(tmp_path / "a", mode):
        pass


def test_atomic_write_new_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_bytes(b"")
    with atomic_write(tmp_path / "ours"):
        pass
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_atomic_path_keeps_the_suffix_and_the_folder(tmp_path):
    with atomic_path(tmp_path / "video.mp4") as temp:
        assert (temp.suffix, temp.parent) == (".mp4", tmp_path)
        temp.write_bytes(b"frames")
    assert names(tmp_path) == ["video.mp4"]


def test_atomic_path_nothing_written_raises_and_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.ply: nothing was written"), atomic_path(tmp_path / "a.ply"):
        pass


def test_atomic_path_directory_raises(tmp_path):
    with pytest.raises(IsADirectoryError, match="came a directory"), atomic_path(tmp_path):
        pass


def test_atomic_path_device_is_not_replaced():
    with pytest.raises(OSError, match="expected a regular file"), atomic_path(os.devnull):
        pass
    assert not os.path.isfile(os.devnull)


def test_atomic_path_symbolic_link_is_kept(tmp_path):
    (tmp_path / "real").mkdir()
    link, target = tmp_path / "link.bin", tmp_path / "real" / "target.bin"
    target.write_bytes(b"old")
    link.symlink_to(target)
    with atomic_write(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_atomic_write_many_writers_one_whole_winner(tmp_path):
    target = tmp_path / "a.bin"

    def write(value):
        with atomic_write(target) as file:
            for _ in range(64):
                file.write(bytes([value]) * 1024)

    threads = [threading.Thread(target=write, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    data = target.read_bytes()
    assert len(data) == 64 * 1024
    assert len(set(data)) == 1
    assert names(tmp_path) == ["a.bin"]
