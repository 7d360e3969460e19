"""Uninstall from the environment that runs this whatever zods does not require without its extras.

What is left is what `pip install zods` brings, and pip itself.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(requirements: list[str], extras: set[str] = frozenset()) -> set[str]:
    """Names of the packages that `requirements` bring on this platform, themselves included, by
    installed metadata.

    extras: of the package that has the requirements. A package that is not installed has no further
    requirements.
    """
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [(Requirement(text), extras) for text in requirements]
    while waiting:
        requirement, of_extras = waiting.pop()
        if requirement.marker and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in ("", *of_extras)
        ):
            continue
        name, wanted = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, wanted) in found:
            continue
        found.add((name, wanted))
        try:
            waiting += [(Requirement(text), set(wanted)) for text in requires(name) or []]
        except PackageNotFoundError:
            continue
    return {name for name, _ in found}


def main() -> None:
    kept = closure(["zods"]) | {"pip", "setuptools"}
    installed = {
        canonicalize_name(distribution.metadata["Name"]) for distribution in distributions()
    }
    surplus = sorted(installed - kept)
    print("uninstalling", *surplus)
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", *surplus], check=True)


if __name__ == "__main__":
    main()
