"""The cache: finished builds appear whole or not at all, whatever is killed; several processes build once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from jit_env import environment, finished

from extend_attn.jit import JitError, cache

# A process that publishes build K, slowly and in two steps, and says when it has begun.
PUBLISH = """
import pathlib, sys, time
from extend_attn.jit import cache
root = cache.writable_root()
def make(folder):
    with open(root / "made", "a") as log:
        log.write("made\\n")
    (folder / "m.so").write_bytes(b"half")
    print("begun", flush=True)
    time.sleep({seconds})
    (folder / "m.so").write_bytes(b"halfhalf")
    return {{"who": "test"}}
print(cache.publish(root, "K", "m.so", make))
"""


def publisher(root: Path, seconds: float) -> subprocess.Popen:
    code = PUBLISH.format(seconds=seconds)
    return subprocess.Popen([sys.executable, "-c", code], env=environment(root), stdout=subprocess.PIPE, text=True)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return cache.writable_root()


def make(folder):
    (folder / "m.so").write_bytes(b"12345678")
    return {"who": "test"}


def never(folder):
    raise AssertionError("built again")


def test_a_finished_build_is_found_and_not_built_again(root):
    path = cache.publish(root, "K", "m.so", make)
    assert path == root / "modules" / "K" / "m.so" and path.read_bytes() == b"12345678"
    assert cache.publish(root, "K", "m.so", never) == path
    assert [entry["key"] for entry in cache.entries(root)] == ["K"]
    assert finished(root) == [path.parent]


def test_a_failed_build_leaves_nothing(root):
    with pytest.raises(AssertionError):
        cache.publish(root, "K", "m.so", never)
    assert finished(root) == []
    assert cache.publish(root, "K", "m.so", make).exists()


@pytest.mark.parametrize("damage", ["truncated", "no manifest", "no module", "manifest is not JSON"])
def test_a_broken_build_is_replaced(root, damage):
    path = cache.publish(root, "K", "m.so", make)
    manifest = path.parent / cache.MANIFEST
    {
        "truncated": lambda: path.write_bytes(b"1234"),
        "no manifest": manifest.unlink,
        "no module": path.unlink,
        "manifest is not JSON": lambda: manifest.write_text("{"),
    }[damage]()
    assert cache.find(path.parent, "m.so") is None
    assert cache.publish(root, "K", "m.so", make).read_bytes() == b"12345678"
    assert finished(root) == [path.parent] and json.loads(manifest.read_text())["bytes"] == 8
    assert sorted(p.name for p in path.parent.iterdir()) == [cache.MANIFEST, "m.so"]


@pytest.mark.parametrize("count", [2, 8])
def test_processes_at_once_build_once(root, count):
    processes = [publisher(root, 0.3) for _ in range(count)]
    last = [p.communicate(timeout=60)[0].split()[-1] for p in processes]
    assert [p.returncode for p in processes] == [0] * count
    assert set(last) == {str(root / "modules" / "K" / "m.so")}
    assert (root / "made").read_text().count("made") == 1
    assert finished(root) == [root / "modules" / "K"]


def test_a_killed_build_leaves_no_module_and_no_lock(root):
    victim = publisher(root, 60)
    assert victim.stdout.readline() == "begun\n"
    waiting = publisher(root, 0)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (root / "modules" / "K").exists()
    assert waiting.communicate(timeout=60)[0].split()[-1] == str(root / "modules" / "K" / "m.so")
    assert finished(root) == [root / "modules" / "K"]  # what the dead one left is gone too
    assert (root / "modules" / "K" / "m.so").read_bytes() == b"halfhalf"


def test_a_lock_held_too_long_is_reported(root):
    holder = publisher(root, 60)
    try:
        assert holder.stdout.readline() == "begun\n"
        with pytest.raises(JitError, match=r"another process has held .*K\.lock"):
            with cache.locked(root, "K", seconds=0.05):
                pass
        with cache.locked(root, "other", seconds=0.05):
            pass
    finally:
        holder.kill()
        holder.wait()


def test_clean_removes_all_but_what_is_being_built(root):
    cache.publish(root, "other", "m.so", make)
    (root / "modules" / ".dead.x1").mkdir()
    (root / "probes" / "p.json").write_text("{}")
    holder = publisher(root, 60)
    try:
        assert holder.stdout.readline() == "begun\n"
        gone, kept = cache.clean(root)
        assert {Path(p).name for p in gone} == {"other", ".dead.x1", "p.json"}
        assert len(kept) == 1 and Path(kept[0]).name.startswith(".K.")
    finally:
        holder.kill()
        holder.wait()
    gone, kept = cache.clean(root)
    assert len(gone) == 1 and not kept and finished(root) == []


@pytest.fixture
def unwritable(tmp_path, monkeypatch):
    """A preferred folder that cannot be made (root may write anywhere, so permissions would not do), and an empty
    fallback."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(cache, "_warned", False)
    return tmp_path


def test_where_home_is_read_only_the_fallback_is_used_with_one_warning(unwritable):
    with pytest.warns(
        RuntimeWarning, match=r"cannot be written \(.*\): compiled modules go to .*set EXTEND_ATTN_CACHE_DIR"
    ):
        root = cache.writable_root()
    assert root.parent == unwritable and root.stat().st_mode & 0o777 == 0o700
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.writable_root() == root
    assert root in cache.roots()


def test_a_fallback_that_others_may_write_to_is_refused(unwritable):
    """What is in it is executed."""
    folder = cache.fallback_root()
    folder.mkdir()
    folder.chmod(0o777)
    assert folder not in cache.roots()
    with pytest.raises(JitError, match="others may write.*set EXTEND_ATTN_CACHE_DIR"):
        cache.writable_root()


def test_a_link_as_fallback_is_refused(unwritable):
    (unwritable / "elsewhere").mkdir(mode=0o700)
    cache.fallback_root().symlink_to(unwritable / "elsewhere")
    with pytest.raises(JitError, match="belongs to someone else"):
        cache.writable_root()


def test_the_platform_says_where_without_the_variable(monkeypatch, tmp_path):
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.preferred_root() == tmp_path / "extend_attn"


def test_facts_are_asked_for_again_only_when_a_file_changed(root, tmp_path):
    tool = tmp_path / "tool"
    tool.write_text("1")
    asked = []

    def ask():
        asked.append(1)
        return {"answer": len(asked)}

    def facts(key="tool"):
        return cache.remembered(key, ask, lambda facts: [str(tool)])["answer"]

    assert (facts(), facts()) == (1, 1)
    os.utime(tool, ns=(0, time.time_ns()))
    assert (facts(), facts()) == (2, 2)  # another time
    tool.write_text("22")
    assert (facts(), facts()) == (3, 3)  # another size
    assert facts("other") == 4
    for probe in (root / "probes").glob("*.json"):
        probe.write_text("{")
    assert facts() == 5  # a damaged record
