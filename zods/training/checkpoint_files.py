"""The files of a checkpoint: their names, what they hold, and how they are verified.

A checkpoint is a folder. Each rank writes a safetensors file of its shards of the parameters, and
one of its shards of the anchor point where the point is stored. A file's metadata has the
fingerprint of each of its tensors. `state.json` has its own checksum, and a digest of each file's
metadata: a file of another checkpoint does not fit. Shards follow one another in rank order, so
that another number of ranks can cut them anew. Nothing is unpickled.

A checkpoint that is written or removed has a name that starts with a dot, which the next save
removes if a crash leaves it. Called by `zods.training.checkpoint`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from zods.comm.communicator import Communicator
from zods.files import atomic_write, check_regular, rename, save_tensors, sync
from zods.kernels import fingerprint
from zods.params.shards import Shard

FORMAT = 3
READABLE = (2, 3)  # format 2 has no digests of the files
# tag; what became of the folder, see `put_in_place` and `remove_old`
HIDDEN = re.compile(r"\.(.+)\.(partial|replaced|removed)")

logger = logging.getLogger(__name__)


# --- folders --------------------------------------------------------------------------------------


def folder_name(tag: Any) -> str:
    """The folder's name for a tag. Raises ValueError where the tag cannot be one."""
    name = str(tag)
    if name in ("", "latest") or name.startswith(".") or "/" in name or "\0" in name:
        raise ValueError(
            f"checkpoint: the tag {name!r} cannot be the name of a checkpoint's folder. Give a "
            "name without '/' that is not 'latest' and does not begin with '.'."
        )
    return name


def hidden_folder(folder: Path, fate: str) -> Path:
    """The folder's name while it is written, replaced or removed."""
    return folder.with_name(f".{folder.name}.{fate}")


def _folder_of(save_dir: Path, tag: str) -> Path:
    """The folder of the checkpoint `tag`: after a crash between the two renames of `put_in_place`,
    the one that was being replaced.
    """
    folder = save_dir / tag
    replaced = hidden_folder(folder, "replaced")
    return replaced if replaced.is_dir() and not folder.exists() else folder


def newest_checkpoints(save_dir: str | Path) -> tuple[list[Path], list[str]]:
    """The checkpoints in a folder that have a good `state.json`, the last step's first, and for each
    other folder the reason why it is left out.

    Their tensors are verified when `zods.training.checkpoint.load_checkpoint` loads one of them. A
    caller that finds one damaged goes on with the next.
    """
    entries = [entry.name for entry in Path(save_dir).iterdir()] if Path(save_dir).is_dir() else []
    tags = {found[1] if (found := HIDDEN.fullmatch(name)) else name for name in entries}
    steps, left_out = {}, []
    for folder in (_folder_of(Path(save_dir), tag) for tag in tags):
        try:
            steps[folder] = int(read_state(folder)["global_steps"])
        except (ValueError, OSError) as error:
            if folder.is_dir():
                left_out.append(str(error))
        except (KeyError, TypeError) as error:
            left_out.append(
                f"checkpoint {folder}: its state.json is not as zods writes it ({error!r})"
            )
    return sorted(steps, key=lambda folder: (steps[folder], folder.name), reverse=True), left_out


def put_in_place(partial: Path, final: Path, save_latest: bool) -> None:
    """Rename a checkpoint that is written whole, and let the file `latest` name it."""
    sync(partial)
    if final.exists():
        replaced = hidden_folder(final, "replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        rename(final, replaced)
    rename(partial, final)
    sync(final.parent)  # before `latest` names it
    if save_latest:
        write_latest(final)


def write_latest(folder: Path) -> None:
    """Let the file `latest` name a checkpoint."""
    with atomic_write(folder.parent / "latest") as temporary:
        temporary.write_text(folder.name)


def hide_removed(folder: Path) -> Path:
    """Rename a checkpoint that is to be removed; returns its hidden folder.

    An interrupted removal then leaves no half checkpoint under the checkpoint's name.
    """
    hidden = hidden_folder(folder, "removed")
    shutil.rmtree(hidden, ignore_errors=True)
    rename(folder, hidden)
    return hidden


def remove_old(written: Path, keep: int | None) -> None:
    """Remove all but the last `keep` numbered checkpoints, and the folders that a crash left.

    A folder that cannot be removed is a warning only, because the new checkpoint is good.
    """
    save_dir = written.parent
    numbered = [
        f for f in newest_checkpoints(save_dir)[0] if re.fullmatch(r"global_step\d+", f.name)
    ]
    try:
        for folder in [] if keep is None else numbered[keep:]:
            if folder != written:
                hide_removed(folder)
        sync(save_dir)
        for entry in save_dir.iterdir():
            if HIDDEN.fullmatch(entry.name) and entry.is_dir():
                shutil.rmtree(entry)
    except OSError as error:
        logger.warning("checkpoint %s: an old one is not removed: %s", written, error)


# --- state.json -----------------------------------------------------------------------------------


def latest_tag(load_dir: Path) -> str | None:
    """The tag in the file `latest`; None where there is no such file."""
    latest = load_dir / "latest"
    check_regular(latest)
    return latest.read_text(errors="replace").strip() if latest.is_file() else None


def find_checkpoint(load_dir: Path, tag: str | None) -> Path:
    """The folder of the checkpoint `tag`, which may be missing.

    tag: None where this rank found no file `latest`; then FileNotFoundError is raised.
    """
    if tag is None:
        raise FileNotFoundError(
            f"checkpoint {load_dir}: no file `latest`, which other ranks find. All share one "
            "folder."
        )
    return _folder_of(load_dir, tag)


def read_state(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's `state.json`.

    Raises FileNotFoundError where it is missing, ValueError where it is damaged or of another
    format.
    """
    path = folder / "state.json"
    check_regular(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint {folder}: no state.json. It is not a checkpoint of zods, or is incomplete."
        )
    try:
        state = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"checkpoint {folder}/state.json: damaged or truncated: {error}"
        ) from error
    if not isinstance(state, dict) or state.get("format") not in READABLE:
        raise ValueError(
            f"checkpoint {folder}: not of format {' or '.join(map(str, READABLE))}, which this "
            "version of zods reads."
        )
    if state.pop("checksum", None) != _checksum(state):
        raise ValueError(f"checkpoint {folder}/state.json: damaged: its checksum is wrong.")
    return state


def state_text(state: Mapping[str, Any]) -> str:
    """The text of `state.json`. Raises TypeError where a value is not JSON."""
    state = {"format": FORMAT, **state}
    return json.dumps({**state, "checksum": _checksum(state)}, indent=1)


def _checksum(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


# --- tensors --------------------------------------------------------------------------------------


def write_tensors(
    folder: Path, role: str, comm: Communicator, tensors: Mapping[Shard, torch.Tensor]
) -> dict[str, str]:
    """Write this rank's shards, and sync the file. Returns {file name: digest of its metadata}.

    role: "parameters" or "anchor_point". tensors: 1-D, in host memory.
    """
    path = folder / f"{role}-rank{comm.rank:05d}-of-{comm.world_size:05d}.safetensors"
    named = {shard.name: values for shard, values in tensors.items()}
    fingerprints = {
        shard.name: _fingerprint_text(values, min(shard.offset, shard.whole_numel))
        for shard, values in tensors.items()
    }
    save_tensors(named, path, fingerprints)
    sync(path)
    return {path.name: _metadata_digest(fingerprints)}


def _metadata_digest(fingerprints: Mapping[str, str]) -> str:
    text = json.dumps(fingerprints, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _fingerprint_text(values: torch.Tensor, offset: int) -> str:
    """offset: of the shard in the whole parameter. It makes two swapped shards show."""
    return f"{fingerprint(values, offset):016x}"


class ShardFiles:
    """The files of one role. Together they hold each parameter whole.

    Opening them checks that all are those that state.json names, and verifies by its fingerprint
    each saved shard from which this rank takes elements. Nothing of this stays in memory.
    """

    def __init__(
        self, folder: Path, role: str, shards: Sequence[Shard], digests: Mapping[str, str] | None
    ) -> None:
        """digests: state.json's digest of each file's metadata; None: it has none (format 2)."""
        paths = sorted(folder.glob(f"{role}-rank*-of-*.safetensors"))
        check_regular(*paths)
        if digests is not None:
            _check_names(folder, {path.name for path in paths}, role, digests)
        self._files = [_TensorFile(path) for path in paths]
        if not self._files:
            raise ValueError(f"checkpoint {folder}: no file of the {role}. It is incomplete.")
        if digests is not None:
            for file in self._files:
                file.check_belongs(digests[file.path.name])
        for shard in shards:
            found = sum(file.shard_of(shard).numel() for file in self._files)
            if found != shard.whole_numel:
                raise ValueError(
                    f"checkpoint {folder}: {shard.name} has {found} of {shard.whole_numel} "
                    f"elements in the {len(self._files)} files of the {role}. A rank's file is "
                    "missing."
                )
        for shard in shards:
            for file, start, low, high in self._parts(shard):
                if low < high:
                    file.verify(shard, start)

    def _parts(self, shard: Shard) -> Iterator[tuple[_TensorFile, int, int, int]]:
        """For each file: (file, start of its saved shard in the whole parameter, and the range of
        the saved shard's elements that are this rank's, as first and last + 1).
        """
        start = 0
        for file in self._files:
            end = start + file.shard_of(shard).numel()
            yield (
                file,
                start,
                max(shard.offset, start) - start,
                min(shard.offset + shard.numel, end) - start,
            )
            start = end

    def read(self, shard: Shard) -> torch.Tensor:
        """This rank's elements of `shard`."""
        parts = [
            file.shard_of(shard)[low:high]
            for file, _, low, high in self._parts(shard)
            if low < high
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=shard.dtype)


def _check_names(folder: Path, found: Collection[str], role: str, named: Collection[str]) -> None:
    """Raise ValueError unless the files of a role are those that state.json names."""
    expected = {name for name in named if name.startswith(f"{role}-rank")}
    missing, odd = sorted(expected - set(found)), sorted(set(found) - expected)
    if missing:
        raise ValueError(f"checkpoint {folder}: {missing[0]} is missing. Load another checkpoint.")
    if odd:
        raise ValueError(
            f"checkpoint {folder}: {odd[0]} is not one of its files. Remove it if you put it there, "
            "or load another checkpoint."
        )


class _TensorFile:
    """A safetensors file whose metadata has the fingerprint of each tensor.

    Raises ValueError or OSError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._readable = False
        try:
            self._file: Any = safe_open(path, framework="pt")
            self._fingerprints: dict[str, str] = self._file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"checkpoint {path}: damaged or truncated: {error}") from error

    def check_belongs(self, digest: str) -> None:
        """Raise ValueError unless the metadata have this digest."""
        if _metadata_digest(self._fingerprints) != digest:
            raise ValueError(
                f"checkpoint {self.path}: it does not belong to the state.json beside it: it is of "
                "another checkpoint, or damaged. Load another checkpoint."
            )

    def shard_of(self, shard: Shard) -> torch.Tensor:
        """The saved shard, 1-D, mapped from the file, not verified."""
        try:
            saved = self._file.get_tensor(shard.name)
        except SafetensorError as error:
            raise ValueError(f"checkpoint {self.path}: {shard.name}: damaged: {error}") from error
        if saved.dtype != shard.dtype or saved.dim() != 1:
            raise ValueError(
                f"checkpoint {self.path}: {shard.name}: damaged: {saved.dtype} of shape "
                f"{list(saved.shape)} instead of {shard.dtype} in one dimension."
            )
        return saved

    def verify(self, shard: Shard, start: int) -> None:
        """Compare a saved shard with its fingerprint. start: its start in the whole parameter."""
        if not self._readable:
            # an unreadable file raises here; read through the mapping it would end the process
            with open(self.path, "rb") as file:
                while file.read(1 << 20):
                    pass
            self._readable = True
        if self._fingerprints.get(shard.name) != _fingerprint_text(self.shard_of(shard), start):
            raise ValueError(
                f"checkpoint {self.path}: {shard.name}: damaged: its fingerprint is not the one "
                "it was saved with. Load another checkpoint."
            )
