"""The C++ kernel as a Python module.

The module is built ahead of time by setup.py, or compiled at first use and cached. torch's own
cache of extensions is not used: it has a lock file that remains when a build is killed, and every
later run then waits for it silently. Here each build has a fresh folder of its own, and the
finished library is moved to its final path in one step. Ranks that start together use a lock, and
the first one compiles. The operating system releases the lock when its holder dies.
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

# -ffp-contract=off: do not fuse a * b + c where reference.py does not. The other two flags let the
# compiler vectorise sqrt and selections, and change no value. -fopenmp is passed to the compiler
# only, see `link_flags`.
EXACT_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
COMPILE_FLAGS = ["-O3", "-fopenmp", *EXACT_FLAGS]
NATIVE_FLAGS = ["-march=native"]


def link_flags(compiler_version: str) -> list[str]:
    """The linker's flags for OpenMP.

    With gcc, the kernel uses the OpenMP runtime of torch, through torch's libraries: a second
    runtime would have threads of its own, which spin on the same cores. Nothing else of torch's
    libraries is used, hence --no-as-needed. Clang needs a runtime of its own.
    """
    return ["-fopenmp"] if "clang" in compiler_version else ["-Wl,--no-as-needed"]


@functools.cache
def cpu_module() -> ModuleType | None:
    """The compiled kernel; None, after one warning, if it can neither be found nor built."""
    try:
        return importlib.import_module("zods.kernels._cpu")
    except ImportError:
        pass
    try:
        return _build_once()
    except Exception as error:  # any error: training can continue with the reference
        warnings.warn(
            f"zods: the C++ kernel could not be built ({error}). The PyTorch reference serves "
            "instead: the same directions, many times slower. A C++ compiler (g++ or clang++, or the "
            "one that CXX names) and ninja are needed.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _build_once() -> ModuleType:
    # Imported here: it is slow, and not needed if the kernel was built ahead of time.
    from torch.utils import cpp_extension

    compiler = shlex.split(cpp_extension.get_cxx_compiler())  # CXX may read "ccache g++"
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(f"there is no C++ compiler: {compiler[0]!r} is not found")
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, check=True
    ).stdout
    # Without an activated environment, ninja is in the folder of the python executable.
    if shutil.which("ninja") is None:
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
    """A digest of everything that the library depends on, with -march=native also the CPU."""
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
    """Hold the lock and yield True; yield False on a file system without locks.

    Without locks every rank compiles, and the last rank's library remains.
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
