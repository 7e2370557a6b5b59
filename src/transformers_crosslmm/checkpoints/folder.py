"""Checkpoint folders: read tensor by tensor, written shard by shard and atomically."""

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError, tqdm
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 2_000_000_000
UNUSED_WEIGHTS = "unused_weights.safetensors"
"""File of a converted checkpoint with the tensors that CrossLMM has no place for, under their old names."""

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")


DOCUMENTS = {"README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"}
PARTS = {
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
}
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
"""Names of a checkpoint's files. Only these are copied or published, and no other files of the folder, such as
optimiser state, `.env`, keys or code."""


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of a folder that belong to its checkpoint. Raises ValueError for a link out of the folder."""
    names = DOCUMENTS | PARTS
    files = [path for path in sorted(folder.iterdir()) if path.name in names or WEIGHTS.fullmatch(path.name)]
    for path in files:
        if path.resolve().parent != folder.resolve():
            raise ValueError(
                f"Files of a checkpoint must be in its folder; {path} is a link to {path.resolve()}. Replace the link "
                "by the file."
            )
    return [path for path in files if path.is_file()]


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 over the files that determine a checkpoint's answers."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name in PARTS or path.suffix in (".safetensors", ".bin"):
            digest.update(f"{path.name}\0{checksum(path)}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: its shape, its type, and `read`, which loads it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def find_folder(name_or_path: str | os.PathLike, *, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a local one, or the cached copy of a model on the Hub, downloaded if needed.

    Downloads `.safetensors`, or `.bin` if there are none. Raises FileNotFoundError.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    try:
        download = partial(snapshot_download, str(name_or_path), revision=revision)
        folder = Path(download(allow_patterns=[*SMALL_FILES, "*.safetensors"]))
        if not list(folder.glob("*.safetensors")):
            folder = Path(download(allow_patterns=[*SMALL_FILES, "*.bin"]))
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"A checkpoint must be a local folder or the name of a model on the Hub; {str(name_or_path)!r} is "
            "neither, or the Hub cannot be reached. Check the name, the connection and, for a gated model, your token."
        ) from error
    return folder


def read_json(path: Path) -> dict:
    """Reads a JSON file. Raises FileNotFoundError or ValueError, both with the path."""
    if not path.is_file():
        raise FileNotFoundError(f"A checkpoint folder must have {path.name}; {path.parent} does not.")
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON; {error}.") from error


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint folder by name, not yet read.

    Single files or shards, `.safetensors` or `.bin`; the latter are unpickled with `weights_only=True`. Raises
    FileNotFoundError for a folder without weights or with missing shards.
    """
    for single, reader in (("model.safetensors", safetensors_of), ("pytorch_model.bin", _pickled)):
        index = folder / f"{single}.index.json"
        if index.is_file():
            shards = _shards_of(index)
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{index} names {', '.join(missing)}, which {folder} lacks. Download it again."
                )
            return {name: tensor for shard in shards for name, tensor in reader(folder / shard).items()}
        if (folder / single).is_file():
            return reader(folder / single)
    raise FileNotFoundError(
        f"A checkpoint folder must have model.safetensors or pytorch_model.bin, or an index of shards of either; "
        f"{folder} has neither."
    )


def _shards_of(index: Path) -> list[str]:
    """The files that an index names. Raises ValueError for names out of its folder: the index may be a stranger's."""
    content = read_json(index)
    named = content.get("weight_map") if isinstance(content, dict) else None
    shards: list[Any] = list(named.values()) if isinstance(named, dict) else [None]
    if not all(isinstance(shard, str) and Path(shard).name == shard for shard in shards):
        raise ValueError(f"{index} must have a `weight_map` from tensors to names of files in its folder.")
    return sorted(set(shards))


def safetensors_of(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a `.safetensors` file. Raises ValueError for a truncated file or another format."""

    def read(name: str) -> Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, not a dict
                view = file.get_slice(name)
                dtype = SAFETENSORS_DTYPES.get(view.get_dtype())
                if dtype is None:
                    known = ", ".join(SAFETENSORS_DTYPES)
                    raise ValueError(f"{path}: {name} must be of a type among {known}; got {view.get_dtype()}.")
                tensors[name] = StoredTensor(tuple(view.get_shape()), dtype, partial(read, name))
    except SafetensorError as error:
        raise ValueError(f"{path} must be a complete safetensors file; {error}. Download it again.") from error
    return tensors


SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def _pickled(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a `.bin` file. Raises ValueError for a truncated file, or one with other objects than tensors."""

    def load() -> Mapping[str, Tensor]:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)

    can_map = zipfile.is_zipfile(path)
    try:
        tensors = load()
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} must be complete and have tensors only: it is read with `weights_only=True`. {error}"
        ) from error
    # Files of torch < 1.6 are loaded completely and stay in memory.
    fetch = (lambda name: load()[name]) if can_map else tensors.__getitem__
    return {
        name: StoredTensor(tuple(tensor.shape), tensor.dtype, partial(fetch, name)) for name, tensor in tensors.items()
    }


def check_free(out: str | os.PathLike, *, force: bool) -> None:
    """Raises FileExistsError if `out` exists and is not empty. `force` permits a checkpoint folder."""
    out = Path(out).expanduser()
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise FileExistsError(f"{out} exists and is not overwritten. Choose another folder, or add --force.")
    if not (out / "config.json").is_file():
        raise FileExistsError(f"--force replaces only a checkpoint folder; {out} has no config.json. Choose another.")


@contextmanager
def new_folder(out: str | os.PathLike, *, force: bool, num_bytes: int) -> Iterator[Path]:
    """A temporary folder that is renamed to `out` when the block succeeds, and deleted when it raises.

    force: replace an existing checkpoint folder, once the new one is complete. num_bytes: how much will be written.
    Raises FileExistsError, and OSError if the disk has too little room.
    """
    check_free(out, force=force)
    out = Path(out).expanduser().resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{num_bytes / 1e9:.1f} GB will be written, {free / 1e9:.1f} GB are free. Make room or write elsewhere",
            str(out.parent),
        )
    # In the same parent as `out`, because renaming works within a file system only. Weights are written last, so that
    # the folder of a killed process does not load.
    partial_folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        yield partial_folder
        umask = os.umask(0)
        os.umask(umask)
        partial_folder.chmod(0o777 & ~umask)  # mkdtemp makes it private
        if out.exists():
            replaced = partial_folder.with_suffix(".replaced")
            out.rename(replaced)
            partial_folder.rename(out)
            shutil.rmtree(replaced)
        else:
            partial_folder.rename(out)
    except BaseException:
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise


def split_into_shards(tensors: Mapping[str, StoredTensor], shard_bytes: int = SHARD_BYTES) -> list[list[str]]:
    """Groups names, in order, into shards of at most `shard_bytes`; a larger tensor gets a shard of its own."""
    shards: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        if not shards or tensor.num_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= tensor.num_bytes
    return shards


def write_weights(folder: Path, tensors: Mapping[str, StoredTensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes model.safetensors, or numbered shards and their index, with no more than one shard in memory."""
    shards = split_into_shards(tensors, shard_bytes)
    total = sum(tensor.num_bytes for tensor in tensors.values())
    weight_map = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="Writing weights") as progress:
        for number, names in enumerate(shards, start=1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            shard = {}
            for name in names:
                shard[name] = tensors[name].read().contiguous()
                weight_map[name] = file
                progress.update(tensors[name].num_bytes)
            save_tensors(shard, folder / file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file. Raises OSError if that fails, such as on a full disk."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(
            errno.EIO, f"The weights could not be written ({error}). Is the disk full?", str(path)
        ) from error
