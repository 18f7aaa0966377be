"""What a run needs of a machine, checked one by one, with the way to fix what is missing.

Used by `prism-nb doctor`. The supported ranges of packages are those of this package's own
metadata, so that they are written once, in pyproject.toml.
"""

import importlib.metadata
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_FREE_DISK = 5  # GB; the phantom profile writes about one
MIN_MEMORY = 4  # GB; the phantom profile peaks at about three


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report."""

    what: str
    good: bool
    found: str
    fix: str = ""


def checks() -> Iterator[Check]:
    """Check Python, packages, device, memory, disk, notebooks and kernel, one after another."""
    yield _python()
    yield from _packages()
    yield from _device()
    yield _memory()
    yield _disk()
    yield _notebooks()
    yield _kernel()


def _python() -> Check:
    from packaging.specifiers import SpecifierSet

    wanted = importlib.metadata.metadata("prism_nb")["Requires-Python"]
    found = ".".join(map(str, sys.version_info[:3]))
    good = SpecifierSet(wanted).contains(found)
    return Check("python", good, f"{found} ({sys.executable})", f"install Python {wanted}")


def _packages() -> Iterator[Check]:
    from packaging.requirements import Requirement

    good = 0
    for text in importlib.metadata.requires("prism_nb") or ():
        need = Requirement(text)
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        fix = f'python -m pip install "{need.name}{need.specifier}"'
        try:
            found = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        if found != "not installed" and need.specifier.contains(found, prereleases=True):
            good += 1
        else:
            yield Check(need.name, False, f"{found}, needs {need.specifier}", fix)
    yield Check("packages", True, f"{good} in their supported ranges")


def _device() -> Iterator[Check]:
    try:
        import torch
    except ImportError as error:
        yield Check("device", False, f"torch does not import: {error}", "reinstall torch")
        return
    if torch.cuda.is_available():
        free, total = (size / 1e9 for size in torch.cuda.mem_get_info())
        name = torch.cuda.get_device_name()
        yield Check("device", True, f"cuda: {name}, {free:.0f} of {total:.0f} GB free")
    else:
        yield Check("device", True, f"cpu, {torch.get_num_threads()} threads (no CUDA: slower)")


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / 1e9:.0f} of {memory.total / 1e9:.0f} GB free"
    fix = f"close other programs; about {MIN_MEMORY} GB are needed"
    return Check("memory", memory.available >= MIN_MEMORY * 1e9, found, fix)


def _disk() -> Check:
    from prism_nb.run import project_root

    root = project_root()
    free = shutil.disk_usage(root).free / 1e9
    fix = f"free some: a run writes up to {MIN_FREE_DISK} GB below {root}"
    return Check("disk", free >= MIN_FREE_DISK, f"{free:.0f} GB free at {root}", fix)


def _notebooks() -> Check:
    from prism_nb.run import STEPS, project_root

    folder = project_root() / "notebooks"
    missing = [name for name in STEPS if not (folder / f"{name}.ipynb").is_file()]
    found = f"{folder}: " + (f"without {', '.join(missing)}" if missing else f"{len(STEPS)} found")
    return Check("notebooks", not missing, found, "work in a clone, and install it there: make lab")


def _kernel() -> Check:
    import os

    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # as `prism-nb run` does
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    fix = "python -m ipykernel install --sys-prefix --name python3"
    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
        program = spec.argv[0]
    except NoSuchKernel:
        return Check("kernel", False, "no kernel named python3", fix)
    except (OSError, ValueError, LookupError) as error:
        return Check("kernel", False, f"python3: its kernel.json is damaged ({error})", fix)
    path = Path(program)
    same = not path.is_absolute() or (path.exists() and path.samefile(sys.executable))
    return Check("kernel", same, f"python3: {spec.resource_dir}, runs {program}", fix)
