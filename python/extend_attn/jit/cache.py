"""The folder where compiled modules and what is known of compilers are kept. Everything in it appears by a rename.

modules/<key>/         a finished build: the module and build.json. Never changed once it is there
modules/.<key>.<x>/    a build under way, or what a killed one left: removed by the next build of that key
locks/<key>.lock       held by the process that builds <key>; the kernel lets go of it when that process ends, however
                       it ends
probes/<hash>.json     facts about a compiler, valid while the files listed in it keep size and time
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

from .errors import JitError, require

VARIABLE = "EXTEND_ATTN_CACHE_DIR"
MANIFEST = "build.json"
# A build takes seconds; who holds the lock for this long is stuck.
LOCK_SECONDS = 900.0
_warned = False


def preferred_root() -> Path:
    """EXTEND_ATTN_CACHE_DIR, or the user's cache folder as the platform has it."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(os.path.abspath(os.path.expanduser(given)))
    return Path(require("platformdirs").user_cache_dir("extend_attn"))


def fallback_root() -> Path:
    """Where modules go if the preferred folder cannot be written: a folder of this user alone, since what is in it is
    executed."""
    return Path(tempfile.gettempdir()) / f"extend_attn-{os.getuid()}"


def roots() -> List[Path]:
    """Where to look for what is there already, in this order. The fallback counts only if it is safely ours."""
    return [preferred_root()] + ([fallback_root()] if _is_private(fallback_root()) else [])


def _is_private(folder: Path) -> bool:
    try:
        facts = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o022


def writable_root() -> Path:
    """The preferred folder, made if need be; else the fallback, with one warning. JitError if neither can be
    written."""
    global _warned
    preferred = preferred_root()
    reason = _why_not_writable(preferred)
    if not reason:
        return preferred
    fallback = fallback_root()
    with contextlib.suppress(OSError):
        os.mkdir(fallback, 0o700)
    problem = (
        _why_not_writable(fallback) if _is_private(fallback) else "it belongs to someone else or others may write to it"
    )
    if problem:
        raise JitError(
            f"no folder for compiled modules: {preferred} ({reason}), {fallback} ({problem}); "
            f"set {VARIABLE} to a folder that can be written"
        )
    if not _warned:
        _warned = True
        warnings.warn(
            f"{preferred} cannot be written ({reason}): compiled modules go to {fallback}; "
            f"set {VARIABLE} to keep them elsewhere",
            RuntimeWarning,
            stacklevel=2,
        )
    return fallback


def _why_not_writable(folder: Path) -> str:
    """Empty if files can be made in ``folder``, else why not. Tried, since permission bits do not tell of read-only
    mounts."""
    try:
        for part in ("modules", "locks", "probes"):
            os.makedirs(folder / part, exist_ok=True)
            if not os.access(folder / part, os.W_OK | os.X_OK):
                return f"no permission to write to {folder / part}"
        with tempfile.TemporaryFile(dir=folder / "locks"):
            return ""
    except OSError as error:
        return error.strerror or str(error)


@contextlib.contextmanager
def locked(root: Path, key: str, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Only one process at a time is inside with the same ``key``. On a file system without locks several may be: what
    they build still appears by one rename, so that costs work and nothing else. JitError after ``seconds``."""
    filelock = require("filelock")
    lock = filelock.FileLock(str(root / "locks" / f"{key}.lock"))
    try:
        lock.acquire(timeout=seconds)
    except filelock.Timeout:
        raise JitError(
            f"another process has held {lock.lock_file} for {seconds:.0f} s: end it if it is stuck"
        ) from None
    except NotImplementedError:
        pass
    try:
        yield
    finally:
        lock.release()


def find(folder: Path, module: str) -> Optional[Path]:
    """The module in the finished build ``folder``; None if there is none or a part of it is missing."""
    manifest = read_json(folder / MANIFEST)
    path = folder / module
    try:
        good = bool(manifest) and os.path.getsize(path) == manifest["bytes"]
    except (OSError, KeyError):
        good = False
    return path if good else None


def publish(root: Path, key: str, module: str, make: Callable[[Path], Dict[str, Any]]) -> Path:
    """The module of the build ``key``: what another process has just finished, or what ``make(folder)`` writes as
    ``folder/module`` (returning facts for build.json), put in place by one rename."""
    folder = root / "modules" / key
    with locked(root, key):
        found = find(folder, module)
        if found:
            return found
        for dead in (root / "modules").glob(f".{key}.*"):  # their builders are gone: this process holds the lock
            shutil.rmtree(dead, ignore_errors=True)
        made = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=root / "modules"))
        try:
            facts = make(made)
            _write(made / MANIFEST, {**facts, "bytes": os.path.getsize(made / module)})
            _sync(made / module)
            if folder.exists():  # broken, or find() would have had it
                os.rename(folder, made / "broken")
            with contextlib.suppress(
                OSError
            ):  # another machine that shares the file system, without its locks, was faster
                os.rename(made, folder)
            shutil.rmtree(folder / "broken", ignore_errors=True)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        found = find(folder, module)
        if not found:
            raise JitError(f"the build in {folder} disappeared: is another program cleaning {root}?")
        return found


def read_json(path: Path) -> Optional[Dict[str, Any]]:
    """None if the file is not there or does not hold a JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _write(path: Path, data: Dict[str, Any]) -> None:
    """A JSON file that is whole or absent, after a crash too."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def fingerprint(path: str) -> List[Any]:
    """Path, size and time of a file, links followed. OSError if it is not there."""
    facts = os.stat(path)
    return [path, facts.st_size, facts.st_mtime_ns]


def remembered(
    key: str, ask: Callable[[], Dict[str, Any]], files: Callable[[Dict[str, Any]], Iterable[str]]
) -> Dict[str, Any]:
    """What ``ask()`` answered once about the tools that ``key`` names, asked again only when one of ``files(answer)``
    changed. Of several processes that would ask at once, one does."""
    name = hashlib.sha256(key.encode()).hexdigest()[:24]
    known = _recall(key, name)
    if known is not None:
        return known
    try:
        root = writable_root()
    except JitError:  # nowhere to write: asked again next time
        return ask()
    with locked(root, f"probe-{name}"):
        known = _recall(key, name)
        if known is None:
            known = ask()
            record = {"key": key, "files": [fingerprint(path) for path in files(known)], "facts": known}
            _write(root / "probes" / f"{name}.json", record)
    return known


def _recall(key: str, name: str) -> Optional[Dict[str, Any]]:
    """The facts of a record that still holds; None if there is none."""
    for root in roots():
        record = read_json(root / "probes" / f"{name}.json")
        try:
            if record and record["key"] == key and all(fingerprint(f[0]) == f for f in record["files"]):
                return record["facts"]
        except (OSError, KeyError, IndexError, TypeError):
            continue
    return None


def entries(root: Path) -> List[Dict[str, Any]]:
    """The finished builds: what build.json says, plus ``key`` and ``folder``."""
    found = []
    for manifest in sorted((root / "modules").glob(f"[!.]*/{MANIFEST}")):
        data = read_json(manifest)
        if data:
            found.append({**data, "key": manifest.parent.name, "folder": str(manifest.parent)})
    return found


def clean(root: Path) -> Tuple[List[str], List[str]]:
    """Removes builds, what killed ones left, and probes; returns (what is gone, what is being built and was let be)."""
    gone: List[str] = []
    kept: List[str] = []
    for folder in sorted((root / "modules").glob("*")):
        key = folder.name.split(".")[1] if folder.name.startswith(".") else folder.name
        try:
            with locked(root, key, seconds=0.0):
                shutil.rmtree(folder, ignore_errors=True)
                gone.append(str(folder))
        except JitError:
            kept.append(str(folder))
    for probe in sorted((root / "probes").glob("*.json")):
        probe.unlink()
        gone.append(str(probe))
    return gone, kept
