"""The C++ kernel as a Python module: made ahead of time by setup.py, or compiled once at first use
and kept.

torch's own cache of extensions has a lock file that stays behind when a build is killed, and every
later run then waits for it silently. So each build gets a fresh folder of its own, and the
finished library is moved to its final place in one step. Ranks that start together take turns by a
lock that the operating system drops when its holder dies: the first one compiles.
"""

import fcntl
import functools
import hashlib
import importlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

SOURCE = Path(__file__).with_name("cpu.cpp")

# The first keeps a * b + c from being fused where reference.py does not; the other two let sqrt and
# selections be vectorised and change no value. -fopenmp goes to the compiler only, see
# `link_flags`.
EXACT_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
COMPILE_FLAGS = ["-O3", "-fopenmp", *EXACT_FLAGS]
NATIVE_FLAGS = ["-march=native"]


def link_flags(compiler_version: str) -> list[str]:
    """With gcc, the OpenMP runtime that torch brings is used, through torch's libraries: a second
    one would have threads of its own, which spin on the same cores. They are linked though nothing
    else of them is used, hence --no-as-needed. Clang needs a runtime of its own.
    """
    return ["-fopenmp"] if "clang" in compiler_version else ["-Wl,--no-as-needed"]


@functools.cache
def cpu_module() -> ModuleType | None:
    """The compiled kernel, or None, after one warning that says why, where it can be neither found
    nor built.
    """
    try:
        return importlib.import_module("zods.kernels._cpu")
    except ImportError:
        pass
    try:
        return _build_once()
    except Exception as error:  # whatever it is, training can go on without
        warnings.warn(
            f"zods: the C++ kernel could not be built ({error}). The PyTorch reference serves "
            f"instead: the same "
            "numbers, many times slower. A C++ compiler (g++ or clang++, or the one that CXX "
            "names) and ninja are needed.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _build_once() -> ModuleType:
    # slow to import, and not needed where the kernel was built ahead of time
    from torch.utils import (
        cpp_extension,
    )

    compiler = shlex.split(cpp_extension.get_cxx_compiler())  # CXX may read "ccache g++"
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(f"there is no C++ compiler: {compiler[0]!r} is not found")
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, check=True
    ).stdout
    if shutil.which("ninja") is None:  # it lies beside a python that was called by its path
        os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    flags = [*COMPILE_FLAGS, *NATIVE_FLAGS]
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    folder = root / f"zods_cpu_{_key([version, *flags])}"
    library = folder / "_cpu.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "building") as alone:
            if not library.exists():  # another rank may have built it meanwhile
                if alone:
                    for leftover in folder.glob("build-*"):  # of builds that were killed
                        shutil.rmtree(leftover, ignore_errors=True)
                _compile(folder, library, flags, link_flags(version))
    return _import(library)


def _key(parts: list[str]) -> str:
    """Whatever decides what the library contains and where it runs. -march=native makes the CPU a
    part of it.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    cpu = sorted(
        {
            line
            for line in lines
            if line.lower().startswith(("flags", "features", "model name", "cpu part"))
        }
    )
    parts = [*parts, *cpu, platform.machine(), torch.__version__, sys.version, SOURCE.read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock, or yield False if the file system has no locks. Every rank compiles then, and
    the last library stays.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _compile(folder: Path, library: Path, flags: list[str], ldflags: list[str]) -> None:
    from torch.utils import cpp_extension

    with tempfile.TemporaryDirectory(
        prefix="build-", dir=folder, ignore_cleanup_errors=True
    ) as fresh:
        cpp_extension.load(
            "_cpu", [str(SOURCE)], extra_cflags=flags, extra_ldflags=ldflags, build_directory=fresh
        )
        os.replace(Path(fresh) / "_cpu.so", library)


def _import(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cpu", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
