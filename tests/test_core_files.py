"""Replacing a file: who may read it stays the same, and what appears meanwhile is not lost."""

from __future__ import annotations

import errno
import os
import shutil
import stat

import pytest

from doconv_core.atomic import replacing, write_text


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "results.txt"


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o664, 0o755, 0o444])
def test_a_replaced_file_keeps_its_permissions(file, umask, kept):
    file.write_text("old")
    file.chmod(kept)
    write_text(file, "new")
    assert (file.read_text(), mode(file)) == ("new", kept)


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_new_file_has_the_usual_permissions(file, umask, mask, expected, overwrite):
    os.umask(mask)
    with replacing(file, overwrite=overwrite) as temporary:
        temporary.write_text("new")
    assert mode(file) == expected


def test_a_link_stays_and_its_file_is_written(file, tmp_path, umask):
    secret, other = tmp_path / "secret", tmp_path / "other"
    secret.write_text("old")
    secret.chmod(0o600)
    other.symlink_to("secret")
    file.symlink_to("other")
    for target in (secret, tmp_path / "nowhere"):
        write_text(file, "new")
        assert file.is_symlink()
        assert other.is_symlink()
        assert target.read_text() == "new"
        other.unlink()
        other.symlink_to("nowhere")
    assert (mode(secret), mode(tmp_path / "nowhere")) == (0o600, 0o644)
    other.unlink()
    other.symlink_to(file.name)
    with pytest.raises(OSError, match="symbolic links"):
        write_text(file, "newer")


@pytest.mark.parametrize("target", ["/dev/null", "/dev/stdout", "/dev/fd/1", "pipe", "link"])
def test_no_pipe_device_or_stream_is_replaced(tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("/dev/stdout", "link")
    before = os.lstat(target).st_ino
    with pytest.raises(OSError, match=f"{target} is no ordinary file; name one to write"):
        write_text(target, "new")
    assert os.lstat(target).st_ino == before


@pytest.mark.parametrize("length", [200, 238, 255])
def test_a_name_may_be_as_long_as_names_can_be(tmp_path, length):
    for letter in ("n", "é", "語"):
        name = letter * (length // len(letter.encode()))
        write_text(tmp_path / name, "new")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_signal_while_the_folder_is_removed_leaves_none(file, monkeypatch):
    removing = iter([KeyboardInterrupt])

    def interrupted(path, remove=shutil.rmtree, **options):
        for signal in removing:
            raise signal
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(file, "new")
    assert list(file.parent.iterdir()) == [file]


def test_owner_and_group_stay(file, umask, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "chown", lambda path, *ids: asked.append(ids))
    file.write_text("old")
    file.chmod(0o640)
    write_text(file, "new")
    assert asked == []
    of_another(file, monkeypatch, uid=12, gid=34)
    write_text(file, "new")
    assert asked == [(12, -1), (-1, 34)]
    assert mode(file) == 0o640


def test_another_group_than_the_old_one_gets_nothing(file, umask, monkeypatch):
    def refused(path, *ids):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    file.write_text("old")
    file.chmod(0o664)
    of_another(file, monkeypatch, uid=12, gid=34)
    monkeypatch.setattr(os, "chown", refused)
    write_text(file, "new")
    assert (file.read_text(), mode(file)) == ("new", 0o604)


def of_another(file, monkeypatch, uid, gid):
    """Let a file seem to be another's."""
    real = type(file).stat

    def told(path, **options):
        found = real(path, **options)
        if path != file:
            return found
        fields = list(found)
        fields[stat.ST_UID], fields[stat.ST_GID] = uid, gid
        return os.stat_result(fields)

    monkeypatch.setattr(type(file), "stat", told)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("dangling", [True, False])
def test_what_appears_meanwhile_is_not_replaced(file, monkeypatch, links, dangling):
    if not links:
        without_links(monkeypatch)

    def write():
        with replacing(file, overwrite=False) as temporary:
            temporary.write_text("new")
            if dangling:
                file.symlink_to("nowhere")
            else:
                file.write_text("precious")

    with pytest.raises(FileExistsError, match=r"results.txt exists; pass overwrite=True to repl"):
        write()
    assert file.is_symlink() if dangling else file.read_text() == "precious"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("links", [True, False])
def test_a_free_name_is_taken(file, monkeypatch, links):
    if not links:
        without_links(monkeypatch)
    with replacing(file, overwrite=False) as temporary:
        temporary.write_text("new")
    assert file.read_text() == "new"
    assert file.stat().st_nlink == 1
    assert list(file.parent.iterdir()) == [file]
    with pytest.raises(FileExistsError), replacing(file, overwrite=False):
        pytest.fail("the block is not entered")


def without_links(monkeypatch):
    """Let the filesystem be one without hard links, such as FAT."""

    def refused(source, target):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), source)

    monkeypatch.setattr(os, "link", refused)
