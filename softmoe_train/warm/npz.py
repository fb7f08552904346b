"""This file owns numpy's .npz archives: arrays that are mapped where they lie, and no pickle, ever.

A member that numpy wrote uncompressed (as big_vision does) is mapped, so that a part of it is read alone; a compressed one is read
whole, and the last is kept. An array of objects, which numpy would unpickle, is refused.
"""

import functools
import math
import struct
import zipfile
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from softmoe_train.checkpoint.agreement import CheckpointError
from softmoe_train.checkpoint.layout import Box
from softmoe_train.warm.lazy import Lazy, window

LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: the lengths of its name and of its extra field come last
BFLOAT16 = np.dtype("V2")  # what numpy makes of JAX's, which it does not know


class Member(NamedTuple):
    """An array of the archive, the length of its own header, and where its data begins in the file (None: compressed)."""

    file: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    header: int
    begin: int | None


def read_npz(path: Path) -> dict[str, Lazy]:
    """Every array of the archive by name; only headers are read. Raises CheckpointError that names what cannot be."""
    tensors: dict[str, Lazy] = {}
    problems = []
    whole = functools.lru_cache(maxsize=1)(functools.partial(_whole, path))
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            try:
                member = _member(file, archive, info)
            except ValueError as error:
                problems.append(f"{name}: {error}")
            else:
                tensors[name] = Lazy(member.shape, functools.partial(_read, path, member, whole), (name,))
    if problems:
        raise CheckpointError(f"{path} cannot be read", problems)
    return tensors


def _member(raw: BufferedReader, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"an array of .npy version {version}, which is not read here")
        header = file.tell()
    if dtype.hasobject or not (dtype == BFLOAT16 or dtype.kind in "fiub"):
        raise ValueError(f"an array of {dtype}, which is not read: only numbers are, and objects would be unpickled")
    begin = None
    if info.compress_type == zipfile.ZIP_STORED and 0 not in shape:
        raw.seek(info.header_offset)
        names = sum(LOCAL_HEADER.unpack(raw.read(LOCAL_HEADER.size)))
        begin = info.header_offset + LOCAL_HEADER.size + names + header
    return Member(info.filename, tuple(shape), dtype, fortran, header, begin)


def _whole(path: Path, member: Member) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        data = archive.read(member.file)[member.header :]
    count = math.prod(member.shape)
    array = np.frombuffer(data, member.dtype, count)
    return array.reshape(member.shape, order="F" if member.fortran else "C")


def _read(path: Path, member: Member, whole: Callable[[Member], np.ndarray], box: Box) -> Tensor:
    if member.begin is None:
        array = whole(member)
    else:
        order = "F" if member.fortran else "C"
        array = np.memmap(path, member.dtype, "r", member.begin, member.shape, order)
    part = np.array(array[window(box)], order="C")
    if member.dtype == BFLOAT16:
        return torch.from_numpy(part.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(part.astype(np.float32))
