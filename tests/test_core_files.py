"""Replacing a file: who may read it stays the same, and what appears meanwhile is not lost."""

from __future__ import annotations

import errno
import os
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


def test_a_replaced_link_gives_its_file_s_permissions(file, tmp_path, umask):
    secret = tmp_path / "secret"
    secret.write_text("old")
    secret.chmod(0o600)
    file.symlink_to(secret)
    write_text(file, "new")
    assert not file.is_symlink()
    assert mode(file) == 0o600
    assert secret.read_text() == "old"
    file.unlink()
    file.symlink_to(tmp_path / "nowhere")
    write_text(file, "new")
    assert mode(file) == 0o644


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
