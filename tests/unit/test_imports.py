"""The table of what each folder of zods may import, and its tests."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "zods"
TOP = ""  # `import zods`: the names that users import

# Folder or file at the top of zods: (those that it may import, packages outside the standard
# library that it may import). Each imports only what stands above it. docs/architecture.md says
# what each is for.
TABLE: dict[str, tuple[set[str], set[str]]] = {
    "files": (set(), {"safetensors"}),
    "config": ({"files"}, {"deepspeed", "hjson", "pydantic", "torch"}),
    "kernels": (set(), {"torch", "triton"}),
    "core": ({"kernels"}, {"torch"}),
    "comm": (set(), {"deepspeed", "mpi4py", "torch"}),
    "data": ({"core"}, {"pyarrow", "torch"}),
    "params": ({"files", "config", "kernels", "core", "comm"}, {"deepspeed", "torch"}),
    "trajectory": (
        {"files", "config", "kernels", "core"},
        {"huggingface_hub", "safetensors", "torch", "tqdm", "transformers"},
    ),
    "black_box": ({"config", "kernels", "core", "data", "trajectory"}, {"numpy", "torch"}),
    "forward": (
        {"kernels", "core", "comm", "data", "params"},
        {"deepspeed", "greenlet", "torch", "tqdm"},
    ),
    "selection": (
        {"config", "kernels", "core", "comm", "data", "params", "forward"},
        {"deepspeed", "torch"},
    ),
    "training": (
        {
            "files", "config", "kernels", "core", "comm", "data", "params", "trajectory", "forward",
            "selection",
        },
        {"deepspeed", "safetensors", "torch", "tqdm"},
    ),
    "doctor": ({TOP, "comm", "kernels", "params"}, {"deepspeed", "torch"}),
    "planning": (
        {"files", "config", "comm", "params", "forward", "training"},
        {"deepspeed", "matplotlib", "torch", "transformers"},
    ),
    "plan": ({"config", "comm", "planning"}, {"torch"}),
    "tasks": ({"files", "data"}, {"datasets", "pyarrow", "torch", "transformers"}),
    "cli": (
        {"files", "config", "comm", "data", "trajectory", "selection", "training", "tasks"},
        {
            "datasets", "deepspeed", "matplotlib", "numpy", "peft", "safetensors", "torch", "tqdm",
            "transformers", "yaml",
        },
    ),
    "report": ({"files", "config", "trajectory", "cli"}, {"matplotlib", "numpy"}),
    "finetune": (
        {TOP, "config", "comm", "params", "training", "tasks", "cli"},
        {"datasets", "deepspeed", "tqdm"},
    ),
    "integrations": (
        {"config", "comm", "data", "training"},
        {"accelerate", "torch", "transformers"},
    ),
}  # fmt: skip
PURE = ("files", "core", "data")
# of DeepSpeed's communication, what sends nothing itself: its count of what ZeRO-3 sends, and its
# section of the configuration
SILENT = ("deepspeed.comm.comm.comms_logger", "deepspeed.comm.config.CommsLoggerConfig")


def files() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def folder_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@functools.cache
def imported(tree: ast.AST) -> list[tuple[str, str | None]]:
    """(module, name taken from it or None) of every absolute import, those inside functions too."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def imports_of_zods(tree: ast.AST) -> list[tuple[str, list[str]]]:
    """(folder, the dotted names taken from it) of every import of zods."""
    found = []
    for module, name in imported(tree):
        parts = [*module.split("."), *([name] if name is not None else [])]
        if parts[0] == "zods":
            found.append((parts[1] if len(parts) > 1 else "", parts[2:]))
    return found


@functools.cache
def dotted_names(tree: ast.AST) -> set[str]:
    """The dotted names in a file, such as `torch.distributed.barrier`, and all their prefixes."""
    found = set()
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name):
            whole = [node.id, *reversed(parts)]
            found |= {".".join(whole[:n]) for n in range(2, len(whole) + 1)}
    return found


@functools.cache
def parse(file: Path) -> ast.AST:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def test_every_folder_is_in_the_table():
    missing = sorted({folder_of(f) for f in files()} - set(TABLE))
    assert not missing, f"folders without a line in TABLE: {missing}"


def test_the_table_points_upward_only():
    order = list(TABLE)
    for folder, (folders, _) in TABLE.items():
        below = [
            other for other in folders if other != TOP and order.index(other) >= order.index(folder)
        ]
        assert not below, f"{folder} may import {below}, which stand at or below it"


@pytest.mark.parametrize("file", files(), ids=name_of)
def test_a_folder_imports_only_the_folders_it_may(file: Path):
    folder = folder_of(file)
    allowed = TABLE[folder][0] | {folder}
    found = {other for other, _ in imports_of_zods(parse(file))}
    assert found <= allowed, (
        f"{name_of(file)} imports {sorted(found - allowed)}; TABLE allows {sorted(allowed)}"
    )


@pytest.mark.parametrize("file", files(), ids=name_of)
def test_a_folder_imports_only_the_packages_it_may(file: Path):
    allowed = TABLE[folder_of(file)][1] | {"zods"}
    found = {module.split(".")[0] for module, _ in imported(parse(file))} - sys.stdlib_module_names
    assert found <= allowed, (
        f"{name_of(file)} imports {sorted(found - allowed)}; TABLE allows {sorted(allowed)}"
    )


@pytest.mark.parametrize("file", files(), ids=name_of)
def test_only_comm_reaches_torch_distributed(file: Path):
    if folder_of(file) == "comm":
        return
    tree = parse(file)
    reached = {
        f"{module}.{name}" if name else module for module, name in imported(tree)
    } | dotted_names(tree)
    sending = [
        n
        for n in reached
        if (n + ".").startswith(("torch.distributed.", "deepspeed.comm.")) and n not in SILENT
    ]
    assert not sending, (
        f"{name_of(file)} reaches {sending}; what zods sends goes through zods.comm.communicator"
    )


def renames_and_syncs(tree: ast.AST) -> set[str]:
    """The calls of `os`, of `shutil` and of a path with one argument that rename or sync a file."""
    reached = {f"{module}.{name}" for module, name in imported(tree)} | dotted_names(tree)
    methods = {
        f"path.{node.func.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and len(node.args) == 1
        if node.func.attr in ("rename", "replace") and not node.keywords
    }
    return (
        reached & {"os.rename", "os.renames", "os.replace", "os.fsync", "shutil.move"}
    ) | methods


# renames outside of zods.files, and why
# kernels import only torch; a library that is lost is built again
RENAMES = {"kernels/build.py": {"os.replace"}}


@pytest.mark.parametrize("file", files(), ids=name_of)
def test_only_files_renames_and_syncs(file: Path):
    if folder_of(file) == "files":
        return
    found = renames_and_syncs(parse(file)) - RENAMES.get(name_of(file), set())
    assert not found, f"{name_of(file)} uses {sorted(found)}; zods.files renames and syncs"


@pytest.mark.parametrize(
    "code",
    [
        "path.replace(to)",
        "path.rename(to)",
        "os.replace(a, b)",
        "from os import fsync",
        "shutil.move(a, b)",
    ],
)
def test_renames_and_syncs_are_found(code: str):
    assert renames_and_syncs(ast.parse(code))


def test_no_modules_import_each_other():
    """There is no cycle of imports of any length."""
    modules = {
        ".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): f
        for f in files()
    }
    waiting = {}
    for module, file in modules.items():
        names = [
            f"{of}.{name}" if f"{of}.{name}" in modules else of
            for of, name in imported(parse(file))
        ]
        waiting[module] = {name for name in names if name in modules} - {module}
    while waiting:
        free = [module for module, others in waiting.items() if not others & set(waiting)]
        assert free, f"a cycle of imports among {sorted(waiting)}"
        waiting = {module: others for module, others in waiting.items() if module not in free}


def test_pure_folders_know_neither_deepspeed_nor_transformers():
    for folder in PURE:
        assert not TABLE[folder][1] & {"deepspeed", "transformers"}
        assert not any(
            TABLE[other][1] & {"deepspeed", "transformers"} for other in TABLE[folder][0]
        )


@pytest.mark.parametrize("file", files(), ids=name_of)
def test_no_import_is_relative(file: Path):
    relative = [
        n.lineno for n in ast.walk(parse(file)) if isinstance(n, ast.ImportFrom) and n.level > 0
    ]
    assert not relative, f"{name_of(file)}: relative imports in lines {relative}"


@pytest.mark.parametrize("file", files(), ids=name_of)
def test_no_private_name_of_another_module_is_used(file: Path):
    """No import takes one (`from zods.a import _b`), and no code reads one as `a._b`."""
    tree = parse(file)
    taken = imports_of_zods(tree)
    private = [
        f"{folder}.{'.'.join(names)}"
        for folder, names in taken
        if any(n.startswith("_") for n in names)
    ]
    modules = {folder for folder, names in taken if not names} | {
        names[-1] for _, names in taken if names
    }
    private += [
        name
        for name in dotted_names(tree)
        if name.split(".")[0] in modules
        and name.split(".")[1].startswith("_")
        and not name.split(".")[1].endswith("__")
    ]
    assert not private, f"{name_of(file)} uses {private}"


@pytest.mark.launched
def test_importing_zods_its_trajectory_and_minimize_imports_no_deepspeed():
    code = (
        "import sys, zods, zods.trajectory.__main__; assert callable(zods.minimize); "
        "sys.exit(str({'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert ended.stderr.strip() == "set()"


def test_the_package_itself_imports_only_what_users_import():
    found = {folder for folder, _ in imports_of_zods(parse(PACKAGE / "__init__.py"))}
    assert found <= {"black_box", "training", "selection"}


def test_no_file_imports_a_module_of_tests():
    """Shared helpers have their own modules, so that a file of tests can be moved or run alone."""
    found = []
    for path in sorted(PACKAGE.parent.glob("tests/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, (ast.Import, ast.ImportFrom))
                else []
            )
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [
                f"{path}: {name}" for name in names if name.rpartition(".")[2].startswith("test_")
            ]
    assert not found


@pytest.mark.parametrize("file", files(), ids=name_of)
def test_functions_take_the_parts_that_they_need_not_the_engine(file: Path):
    """`deepspeed_engine: Any` is DeepSpeed's own, which has no types."""
    untyped = [
        node.lineno
        for node in ast.walk(parse(file))
        if isinstance(node, ast.arg) and node.arg == "engine"
        if node.annotation is None or ast.unparse(node.annotation) == "Any"
    ]
    assert not untyped, f"{name_of(file)}: a parameter `engine` without a type in lines {untyped}"


@pytest.mark.parametrize("file", files(), ids=name_of)
def test_nobody_sets_an_attribute_of_an_engine(file: Path):
    """Its own methods do, as `self.x = ...`."""
    found = []
    for node in ast.walk(parse(file)):
        if not isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        owners = [ast.unparse(part.value) for target in targets for part in ast.walk(target)
                  if isinstance(part, ast.Attribute)]  # fmt: skip
        found += [node.lineno for owner in owners if "engine" in owner.split(".")]
    assert not found, f"{name_of(file)} sets an attribute of an engine in lines {found}"


@pytest.mark.parametrize("file", files(), ids=name_of)
def test_nothing_reads_the_date_which_may_differ_by_hours_between_hosts(file: Path):
    """Durations are measured by time.monotonic and time.perf_counter."""
    dates = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "date.today"}
    found = [
        node.lineno
        for node in ast.walk(parse(file))
        if isinstance(node, ast.Attribute)
        if ast.unparse(node).removeprefix("datetime.") in dates
    ]
    assert not found, f"{name_of(file)} reads the date in lines {found}"
