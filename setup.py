"""The optional ahead-of-time build of the C++ kernel; everything else is in pyproject.toml.

    ZODS_BUILD_KERNELS=1 pip install --no-build-isolation .

Without it nothing is compiled here and torch is not needed: the kernel is compiled at its first
use, for the CPU it runs on. This build is for images that run on many machines: it asks for no more
than AVX2 and FMA on x86-64 (-march=x86-64-v3: Intel since Haswell, AMD since Zen) and the
compiler's default elsewhere (every 64-bit ARM has NEON and FMA).
"""

import os
import platform
import runpy
import shlex
import subprocess

from setuptools import setup

options = {}
if os.environ.get("ZODS_BUILD_KERNELS") == "1":
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler

    # by path: importing zods would need all its dependencies
    build = runpy.run_path("zods/kernels/build.py")
    compiler = shlex.split(get_cxx_compiler())
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, check=True
    ).stdout
    portable_flags = ["-march=x86-64-v3"] if platform.machine() in ("x86_64", "AMD64") else []
    options = {
        "ext_modules": [
            CppExtension(
                "zods.kernels._cpu",
                ["zods/kernels/cpu.cpp"],
                extra_compile_args=[*build["COMPILE_FLAGS"], *portable_flags],
                extra_link_args=build["link_flags"](version),
            )
        ],
        "cmdclass": {"build_ext": BuildExtension},
    }

setup(**options)
