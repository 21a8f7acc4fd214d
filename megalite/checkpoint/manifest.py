"""`manifest.json` of a checkpoint: what it is of, where each slice of each tensor lies. No torch.

It begins with the digest of all that follows, so that no byte of it changes unseen. Nothing it says
is believed before it is checked against itself and against headers and sizes of its files: names
are plain file names, slices cover every tensor once, types and shapes are those of the files. Only
then is memory taken for anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from megalite.checkpoint.regions import Region, covers_once, whole
from megalite.checkpoint.tensor_file import ITEM_BYTES, Layout, file_digest, read_layout
from megalite.errors import DamagedError

NAME = "manifest.json"
FORMAT = "megalite checkpoint"
VERSION = 1
LONGEST_BYTES = 1 << 30
ALGORITHM = "sha256 of pieces' sha256"
_BEGIN = '{{"sha256": "{}",'


@dataclass(frozen=True)
class Slice:
    """A region of a tensor, and the file that has it under the tensor's name.

    Attributes:
        file: number of the file.
        region: of the whole tensor.
    """

    file: int
    region: Region


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor.

    Attributes:
        dtype: as safetensors calls it.
        shape: of the whole.
        slices: which cover it once.
    """

    dtype: str
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class StoredFile:
    """A file.

    Attributes:
        name: in the checkpoint's folder.
        num_bytes: of all of it.
        digests: of its pieces, `tensor_file.Layout.pieces`.
    """

    name: str
    num_bytes: int
    digests: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's contents.

    Attributes:
        step: optimizer steps that have been taken.
        samples, tokens: that they took.
        facts: JSON values: configuration, fingerprints, versions.
        tensors: by name.
        files: of the ranks that wrote any.
    """

    step: int
    samples: int
    tokens: int
    facts: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    files: tuple[StoredFile, ...] = field(repr=False)

    def to_json(self) -> str:
        """The text of the file."""
        text = json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "step": self.step,
                "samples": self.samples,
                "tokens": self.tokens,
                **self.facts,
                "digest": ALGORITHM,
                "files": [
                    {
                        "name": file.name,
                        "bytes": file.num_bytes,
                        "digest": file_digest(file.digests),
                        "pieces": file.digests,
                    }
                    for file in self.files
                ],
                "tensors": {
                    name: {
                        "dtype": tensor.dtype,
                        "shape": tensor.shape,
                        "slices": [{"file": s.file, **asdict(s.region)} for s in tensor.slices],
                    }
                    for name, tensor in sorted(self.tensors.items())
                },
            },
            indent=1,
        )
        return _BEGIN.format(sha256(text.encode()).hexdigest()) + text.removeprefix("{")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, consistent in itself and with sizes and headers of its files.

    Raises:
        DamagedError: it is not there, or anything in it is not right.
    """
    path = folder / NAME
    content = _content(path)
    try:
        files = tuple(_files(content["files"]))
        for file in files:
            open_file(folder, file)
        _check_config(content.get("config", {"derived": []}))
        tensors = {name: _tensor(name, said) for name, said in content["tensors"].items()}
        step, samples, tokens = (_count(content[name]) for name in ("step", "samples", "tokens"))
        told = {"format", "version", "step", "samples", "tokens", "digest", "files", "tensors"}
        facts = {name: value for name, value in content.items() if name not in told}
        manifest = Manifest(step, samples, tokens, facts, tensors, files)
        _check_tensors(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, DamagedError):
            raise
        why = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
        raise DamagedError(f"{path} is damaged: {why}") from None
    _check_files(folder, manifest)
    return manifest


def _content(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LONGEST_BYTES:
            raise DamagedError(f"{path} has more than {LONGEST_BYTES} bytes: no manifest has")
        text = path.read_text(encoding="utf-8")
        begin = _BEGIN.format("0" * 64)
        rest = "{" + text[len(begin) :]
        if text[: len(begin)] != _BEGIN.format(sha256(rest.encode()).hexdigest()):
            raise DamagedError(f"{path} is damaged: its digest is another one")
        content = json.loads(rest)
    except OSError as error:
        raise DamagedError(f"{path} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DamagedError(f"{path} is no manifest of a {FORMAT}")
    if content.get("version") != VERSION or content.get("digest") != ALGORITHM:
        raise DamagedError(
            f"{path} is of version {content.get('version')!r}, {content.get('digest')!r}; this "
            f"megalite reads version {VERSION}, {ALGORITHM!r}"
        )
    return content


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} is no count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _files(said: Sequence[Mapping[str, Any]]) -> Iterator[StoredFile]:
    for each in said:
        name = _text(each["name"])
        if Path(name).name != name or "\\" in name or "\0" in name or name in ("", ".", ".."):
            raise ValueError(f"{name!r} is no plain file name")
        digests = tuple(map(_text, each["pieces"]))
        if any(len(bytes.fromhex(text)) != 32 for text in digests):
            raise ValueError(f"{name!r} has digests of another length")
        if each["digest"] != file_digest(digests):
            raise ValueError(f"the digest of {name!r} is not that of its pieces")
        yield StoredFile(name, _count(each["bytes"]), digests)


def _tensor(name: str, said: Mapping[str, Any]) -> StoredTensor:
    dtype, shape = _text(said["dtype"]), tuple(map(_count, said["shape"]))
    if dtype not in ITEM_BYTES:
        raise ValueError(f"{name!r} is of type {dtype!r}; known are {', '.join(ITEM_BYTES)}")
    slices = []
    for each in said["slices"]:
        numbers = {key: _count(value) for key, value in each.items()}
        slices.append(Slice(numbers.pop("file"), Region(**numbers)))
    return StoredTensor(dtype, shape, tuple(slices))


def _check_tensors(manifest: Manifest) -> None:
    names = [file.name for file in manifest.files]
    if len(set(names)) < len(names):
        raise ValueError("two files have one name")
    for name, tensor in manifest.tensors.items():
        if any(each.file >= len(names) for each in tensor.slices):
            raise ValueError(f"{name!r} lies in a file that is not listed")
        if len({each.file for each in tensor.slices}) < len(tensor.slices):
            raise ValueError(f"{name!r} lies in one file twice")
        if wrong := covers_once(tensor.shape, [each.region for each in tensor.slices]):
            raise ValueError(f"{name!r}: {wrong}")


def _check_config(said: Any) -> None:
    """What `Config.to_saved` gives: groups of fields, and names of those that were derived."""
    groups = dict(said)
    derived = groups.pop("derived", [])
    if not isinstance(derived, list) or not all(isinstance(name, str) for name in derived):
        raise ValueError("'config' names no derived fields")
    if not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError("'config' is no configuration")


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Sizes and headers, each against what the manifest says."""
    held: list[dict[str, tuple[str, Region, tuple[int, ...]]]] = [{} for _ in manifest.files]
    for name, tensor in manifest.tensors.items():
        for each in tensor.slices:
            held[each.file][name] = tensor.dtype, each.region, tensor.shape
    for file, expected in zip(manifest.files, held, strict=True):
        layout = open_file(folder, file)
        found = {entry.name: entry for entry in layout.entries}
        for name in expected.keys() | found.keys():
            if name not in found or name not in expected:
                has = "has" if name in found else "lacks"
                raise DamagedError(f"{folder / file.name} {has} {name!r}; the manifest differs")
            dtype, region, shape = expected[name]
            if found[name].dtype != dtype or found[name].shape != file_shape(region, shape):
                raise DamagedError(
                    f"{folder / file.name}: {name!r} is {found[name].dtype} of shape "
                    f"{list(found[name].shape)}; the manifest says {dtype} of shape "
                    f"{list(file_shape(region, shape))}"
                )


def file_shape(region: Region, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a slice in its file: its box's where it is all of it, else its elements in a row."""
    if region == whole(shape):
        return shape
    if not region.is_whole:
        return (region.length,)
    return (region.rows,) if len(shape) < 2 else (region.rows, region.columns)


def open_file(folder: Path, file: StoredFile) -> Layout:
    """The layout of a file, of the size that the manifest says.

    Raises:
        DamagedError: it is not there, of another size, or not what it should be.
    """
    path = folder / file.name
    try:
        status = path.lstat()
    except OSError as error:
        raise DamagedError(f"{path} can't be read: {error.strerror}") from None
    if not path.is_file() or path.is_symlink():
        raise DamagedError(f"{path} is no plain file")
    if status.st_size != file.num_bytes:
        raise DamagedError(
            f"{path} has {status.st_size} bytes, and the manifest tells of {file.num_bytes}"
        )
    layout = read_layout(path)
    if len(layout.pieces()) != len(file.digests):
        raise DamagedError(f"{path} has not so many pieces as the manifest tells of")
    return layout
