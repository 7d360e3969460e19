"""Which room of zods may import which, and what else: the table, and its test."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "zods"
FACE = ""  # `import zods`: what users import

# room: (rooms it may import, packages outside the standard library it may import). A room imports only rooms above it.
TABLE: dict[str, tuple[set[str], set[str]]] = {
    "files": (set(), set()),
    "mistakes": (set(), {"pydantic"}),
    "section": ({"mistakes"}, {"pydantic"}),
    "steps": (set(), {"torch"}),
    "config_auto": (set(), set()),
    "config_deepspeed": ({"mistakes", "section"}, {"deepspeed", "pydantic"}),
    "schedules": ({"config_deepspeed"}, {"torch", "deepspeed"}),
    "config": (
        {"mistakes", "section", "steps", "config_auto", "config_deepspeed", "schedules"},
        {"hjson", "torch"},
    ),
    "kernels": (set(), {"torch", "triton"}),
    "directions": ({"kernels"}, {"torch"}),
    "estimators": ({"kernels"}, set()),
    "comm": (set(), {"torch"}),
    "build_locks": (set(), {"torch"}),
    "launching": ({"build_locks", "comm"}, {"torch", "deepspeed"}),
    "watchdog": ({"comm"}, set()),
    "stopping": (set(), set()),
    "batch": (set(), {"torch"}),
    "data": (set(), {"torch"}),
    "rule": ({"section", "directions", "estimators"}, set()),
    "trajectory": (
        {"files", "section", "kernels", "directions", "estimators", "rule"},
        {"torch", "safetensors", "tqdm", "huggingface_hub", "transformers"},
    ),
    "sharding": ({"directions", "estimators", "comm"}, {"torch", "deepspeed"}),
    "deferral": ({"directions", "estimators", "sharding"}, {"deepspeed"}),
    "stacking": (set(), {"torch"}),
    "factored": ({"kernels"}, {"torch"}),
    "observing": (set(), {"torch"}),
    "scratch": (set(), {"torch"}),
    "large_matrices": ({"observing"}, {"torch"}),
    "wrapping": (set(), {"torch"}),
    "lockstep": (set(), {"torch", "deepspeed", "greenlet"}),
    "streams": (
        {"directions", "stacking", "factored", "large_matrices", "lockstep", "observing", "scratch", "wrapping"},
        {"torch", "deepspeed"},
    ),
    "anchor": ({"section", "kernels", "directions", "estimators", "comm", "sharding", "streams"}, {"torch", "deepspeed"}),
    "objectives": ({"batch"}, {"torch"}),
    "memory": (set(), {"torch"}),
    "measuring": ({"batch", "comm", "data", "objectives"}, {"torch"}),
    "forwards": (
        {"batch", "comm", "deferral", "directions", "objectives", "sharding", "stacking", "streams"},
        {"torch"},
    ),
    "choose_form": ({"batch", "forwards", "memory", "objectives", "sharding", "streams"}, {"torch", "deepspeed", "tqdm"}),
    "evaluation": (
        {
            "batch", "choose_form", "comm", "data", "deferral", "directions", "forwards", "lockstep", "objectives",
            "sharding", "stacking", "streams",
        },
        {"torch", "tqdm"},
    ),
    "selection": (
        {"batch", "section", "measuring", "kernels", "directions", "comm", "data", "objectives", "sharding"},
        {"torch", "deepspeed"},
    ),
    "export": ({"comm", "sharding"}, {"torch", "safetensors"}),
    "recording": ({"config", "data", "estimators", "selection", "trajectory"}, set()),
    "state": ({"estimators", "steps", "streams"}, {"torch"}),
    "training_run": (
        {
            "anchor", "comm", "config", "data", "deferral", "directions", "estimators", "recording", "selection",
            "sharding", "state", "trajectory",
        },
        {"torch"},
    ),
    "checkpoint": (
        {"files", "section", "kernels", "anchor", "estimators", "sharding", "training_run"},
        {"torch", "safetensors"},
    ),
    "replicas": ({"comm", "section", "trajectory"}, set()),
    "resuming": (
        {
            "checkpoint", "comm", "config", "files", "kernels", "replicas", "selection", "sharding", "training_run",
            "trajectory",
        },
        {"torch", "safetensors", "tqdm"},
    ),
    "engine_face": (
        {
            "checkpoint", "comm", "config", "estimators", "export", "sharding", "state", "steps", "training_run",
        },
        {"torch"},
    ),
    "engine": (
        {
            "checkpoint", "config", "estimators", "comm", "data", "deferral", "sharding", "state", "streams", "anchor",
            "rule", "trajectory", "training_run", "evaluation", "selection", "measuring", "recording", "replicas",
            "resuming", "steps", "stopping", "watchdog", "engine_face",
        },
        {"torch"},
    ),
    "extras": (set(), set()),
    "model_setup": ({"sharding"}, {"torch"}),
    "initialization": (
        {
            "section", "config", "config_auto", "schedules", "kernels", "comm", "data", "sharding", "anchor", "engine",
            "extras", "selection", "steps", "launching", "memory", "model_setup", "wrapping",
        },
        {"torch", "deepspeed"},
    ),
    "first_order": (
        {
            "batch", "comm", "config", "data", "export", "files", "measuring", "objectives", "recording", "resuming",
            "selection", "steps", "stopping", "trajectory",
        },
        {"torch", "deepspeed"},
    ),
    "summary": ({"engine", "first_order"}, {"torch", "deepspeed"}),
    "tasks": ({"objectives"}, {"torch", "transformers", "datasets", "pyarrow"}),
    "options": ({"section"}, set()),
    "arguments": ({"config", "mistakes", "options", "section"}, {"transformers", "yaml"}),
    "pretrained": (
        {"config", "options", "tasks", "trajectory"},
        {"torch", "deepspeed", "transformers", "safetensors", "peft"},
    ),
    "runs": ({"files"}, set()),
    "report": ({"runs"}, {"matplotlib"}),
    "finetune": (
        {
            FACE, "config", "config_auto", "comm", "engine", "extras", "first_order", "launching", "memory", "pretrained",
            "schedules", "selection",
            "initialization", "resuming", "stopping", "summary", "tasks", "options", "arguments", "runs", "report",
        },
        {"torch", "deepspeed", "datasets", "tqdm"},
    ),
}  # fmt: skip
PURE = ("mistakes", "section", "options", "config_auto", "directions", "estimators", "rule", "data")
# of DeepSpeed's communication, what sends nothing itself: its count of what ZeRO-3 sends, and its section of the configuration
SILENT = ("deepspeed.comm.comm.comms_logger", "deepspeed.comm.config.CommsLoggerConfig")


def files() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def imported(tree: ast.AST) -> list[tuple[str, str | None]]:
    """(module, name taken from it or None) of every absolute import, those inside functions too."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def room_imports(tree: ast.AST) -> list[tuple[str, list[str]]]:
    """(room, the dotted names taken from it) of every import of zods."""
    found = []
    for module, name in imported(tree):
        parts = [*module.split("."), *([name] if name is not None else [])]
        if parts[0] == "zods":
            found.append((parts[1] if len(parts) > 1 else "", parts[2:]))
    return found


def dotted_names(tree: ast.AST) -> set[str]:
    """What is reached as an attribute of a name, e.g. `torch.distributed.barrier` and its beginnings."""
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


def parse(file: Path) -> ast.AST:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def test_every_room_is_in_the_table():
    missing = sorted({room_of(f) for f in files()} - set(TABLE))
    assert not missing, f"rooms without a line in TABLE: {missing}"


def test_the_table_points_upward_only():
    order = list(TABLE)
    for room, (rooms, _) in TABLE.items():
        below = [other for other in rooms if other != FACE and order.index(other) >= order.index(room)]
        assert not below, f"{room} may import {below}, which stand at or below it"


@pytest.mark.parametrize("file", files(), ids=name_of)
def test_a_room_imports_only_the_rooms_it_may(file: Path):
    room = room_of(file)
    allowed = TABLE[room][0] | {room}
    found = {other for other, _ in room_imports(parse(file))}
    assert found <= allowed, f"{name_of(file)} imports {sorted(found - allowed)}; TABLE allows {sorted(allowed)}"


@pytest.mark.parametrize("file", files(), ids=name_of)
def test_a_room_imports_only_the_packages_it_may(file: Path):
    allowed = TABLE[room_of(file)][1] | {"zods"}
    found = {module.split(".")[0] for module, _ in imported(parse(file))} - sys.stdlib_module_names
    assert found <= allowed, f"{name_of(file)} imports {sorted(found - allowed)}; TABLE allows {sorted(allowed)}"


@pytest.mark.parametrize("file", files(), ids=name_of)
def test_only_comm_reaches_torch_distributed(file: Path):
    if room_of(file) == "comm":
        return
    tree = parse(file)
    reached = {f"{module}.{name}" if name else module for module, name in imported(tree)} | dotted_names(tree)
    sending = [
        n for n in reached if (n + ".").startswith(("torch.distributed.", "deepspeed.comm.")) and n not in SILENT
    ]
    assert not sending, f"{name_of(file)} reaches {sending}; what zods sends goes through zods.comm"


def renames_and_syncs(tree: ast.AST) -> set[str]:
    """The calls that rename or sync a file: of `os`, of `shutil`, and of a path with one argument."""
    reached = {f"{module}.{name}" for module, name in imported(tree)} | dotted_names(tree)
    methods = {
        f"path.{node.func.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and len(node.args) == 1
        if node.func.attr in ("rename", "replace") and not node.keywords
    }
    return (reached & {"os.rename", "os.renames", "os.replace", "os.fsync", "shutil.move"}) | methods


# renames outside of zods.files, and why
# kernels import only torch; a library that is lost is built again
RENAMES = {"kernels/build.py": {"os.replace"}}


@pytest.mark.parametrize("file", files(), ids=name_of)
def test_only_files_renames_and_syncs(file: Path):
    if room_of(file) == "files":
        return
    found = renames_and_syncs(parse(file)) - RENAMES.get(name_of(file), set())
    assert not found, f"{name_of(file)} uses {sorted(found)}; zods.files renames and syncs"


@pytest.mark.parametrize(
    "code", ["path.replace(to)", "path.rename(to)", "os.replace(a, b)", "from os import fsync", "shutil.move(a, b)"]
)
def test_renames_and_syncs_are_found(code: str):
    assert renames_and_syncs(ast.parse(code))


def test_pure_rooms_know_neither_deepspeed_nor_transformers():
    for room in PURE:
        assert not TABLE[room][1] & {"deepspeed", "transformers"}
        assert not any(TABLE[other][1] & {"deepspeed", "transformers"} for other in TABLE[room][0] - {"sharding"})


@pytest.mark.parametrize("file", files(), ids=name_of)
def test_no_import_is_relative(file: Path):
    relative = [n.lineno for n in ast.walk(parse(file)) if isinstance(n, ast.ImportFrom) and n.level > 0]
    assert not relative, f"{name_of(file)}: relative imports in lines {relative}"


@pytest.mark.parametrize("file", files(), ids=name_of)
def test_no_private_name_of_another_room_is_used(file: Path):
    """Neither imported (`from zods.a import _b`) nor reached through the module (`a._b`)."""
    tree = parse(file)
    others = [(room, names) for room, names in room_imports(tree) if room != room_of(file)]
    private = [f"{room}.{'.'.join(names)}" for room, names in others if any(n.startswith("_") for n in names)]
    modules = {room for room, names in others if not names} | {names[-1] for _, names in others if names}
    private += [
        name
        for name in dotted_names(tree)
        if name.split(".")[0] in modules
        and name.split(".")[1].startswith("_")
        and not name.split(".")[1].endswith("__")
    ]
    assert not private, f"{name_of(file)} uses {private}"


def test_the_package_itself_imports_only_what_users_import():
    found = {room for room, _ in room_imports(parse(PACKAGE / "__init__.py"))}
    assert found <= {"initialization", "selection"}


def test_no_file_imports_a_module_of_tests():
    """Shared helpers have modules of their own, so that a file of tests can be moved or run alone."""
    found = []
    for path in sorted(PACKAGE.parent.glob("tests/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path}: {name}" for name in names if name.rpartition(".")[2].startswith("test_")]
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
