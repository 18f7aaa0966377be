"""Whole files or none: every file that the project writes goes through here.

A writer fills a temporary file beside the target; only when it is complete and on the disk is it
renamed into place. A killed process or a full disk leaves the old file, or no file, never half of
one. Temporary names start with a dot, so that no listing of results picks one up.
Used by every module that writes, and by all notebooks through `Run`.
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

TEMPORARY = ".partial-"  # a name that starts so is being written, or was left by a killed process


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path` and rename it into place when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary_path(path)
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty temporary folder and put it in the place of `path` when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = temporary_path(path), temporary_path(path)
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _sync(file)
        if path.exists():
            os.replace(path, old)  # a folder that is not empty cannot be replaced in one step
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(path: Path | str) -> Iterator[bool]:
    """Hold a lock file, and yield whether we got it; the system frees it when the process ends."""
    import fcntl  # not on Windows, where notebooks work and only `prism-nb run` does not

    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def temporary_path(path: Path) -> Path:
    """A name beside `path`, with its suffix, that tells who writes it: see abandoned."""
    writer = f"{os.getpid()}-{_host()}"
    return path.with_name(f"{TEMPORARY}{writer}-{uuid.uuid4().hex[:12]}{path.suffix}")


def abandoned(name: str) -> bool:
    """Whether a name is a temporary one whose writer, a process of this machine, is gone."""
    writer = re.match(rf"{re.escape(TEMPORARY)}(\d+)-([0-9a-f]{{8}})-", name)
    if not writer:  # names of older versions tell no writer
        return name.startswith(TEMPORARY)
    pid, host = writer.groups()
    return host == _host() and not psutil.pid_exists(int(pid))


def write_text(path: Path | str, text: str) -> Path:
    """Write a text file in UTF-8, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def write_json(path: Path | str, value: object) -> Path:
    """Write strict JSON with sorted keys; NaN and infinity become null, NumPy becomes plain."""
    text = json.dumps(plain(value), indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    return write_text(path, text + "\n")


def read_json(path: Path | str) -> object:
    """Read a JSON file; a damaged one is a ValueError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise ValueError(f"{path} is no readable JSON ({error}); delete it, run again") from None


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def one_line(error: object, most: int = 160) -> str:
    """The first line of what an error says, or the name of its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


def plain(value: object) -> object:
    """A copy of `value` in strict JSON's types; non-finite numbers become None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [plain(item) for item in items]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, torch tensors
        return plain(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, os.PathLike):
        return Path(value).as_posix()
    raise TypeError(f"{type(value).__name__} has no JSON form; give numbers, text, lists or dicts")


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _sync(path: Path) -> None:
    # Without this a crash of the machine can leave the new name on an empty file.
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
