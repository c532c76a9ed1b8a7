"""What can be wrong with a raw image, as a file and as an array."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretraining.data.bad_images import BadImages

Problem = tuple[str, str]
"""What was found and what was expected."""
CHUNK = 1 << 20
"""Bytes read at a time; a multiple of every voxel size."""


def inspect_case(
    files: Sequence[Path], reader: Callable[[], Any], channels: int, patch_dims: int, bad: BadImages
) -> tuple[float, ...] | None:
    """Read every file of a case, one at a time, and collect what is wrong.

    Args:
        files: One per channel (or one picture with several channels), named `<case>_<channel><ending>`.
        reader: nnU-Net's reader class.
        channels: How many the case must have.
        patch_dims: 2 or 3, of the configuration.
        bad: The collector.

    Returns:
        The spacing (z, y, x) in mm, or `None` if something is wrong.
    """
    numbers = [int(re.findall(r"_(\d{4})\.", path.name)[-1]) for path in files]
    if numbers != list(range(len(files))):
        found = ", ".join(f"{number:04d}" for number in numbers)
        bad.add(files[0], f"the channel(s) {found}", f"{channels} channel(s), the first one 0000")
        return None
    read = [_read(path, reader, patch_dims, bad) for path in files]
    usable = [geometry for geometry in read if geometry is not None]
    if len(usable) < len(read):
        return None
    total = sum(shape[0] for shape, _ in usable)
    if total != channels:
        bad.add(files[0], f"{total} channel(s) in {len(files)} file(s)", f"{channels} channel(s) as in dataset.json")
        return None
    (_, *extents), spacing = usable[0]
    for path, (shape, other) in zip(files, usable, strict=True):
        if list(shape[1:]) != extents or not np.allclose(other, spacing, rtol=1e-5):
            expected = f"{tuple(extents)} and {spacing} as in {files[0].name}"
            bad.add(path, f"shape {shape[1:]} and spacing {other}", expected)
            return None
    return spacing


def _read(
    path: Path, reader: Callable[[], Any], patch_dims: int, bad: BadImages
) -> tuple[tuple[int, ...], tuple[float, ...]] | None:
    """Shape (C, Z, Y, X) and spacing of a file, or `None` after collecting what is wrong with it."""
    problem = raw_file_problem(path)
    if problem is None:
        try:
            array, properties = reader().read_images([str(path)])
        except Exception as error:  # nnU-Net's readers raise many types
            problem = f"an unreadable file ({describe(error)})", f"an image that nnU-Net's {reader.__name__} reads"
        else:
            spacing = tuple(float(s) for s in properties["spacing"])
            problem = raw_array_problem(array, spacing, patch_dims)
            if problem is None:
                return tuple(int(n) for n in array.shape), spacing
    bad.add(path, *problem)
    return None


def raw_file_problem(path: Path) -> Problem | None:
    """What is wrong with a raw image file: absent, empty, cut off, NaN or infinite voxels.

    Readers do not notice: SimpleITK fills what is missing of a cut NIfTI file with zeros, and replaces NIfTI voxels
    that are not finite with zeros too. Files of other formats are left to their readers, which do, but for .gipl files.
    """
    try:
        if not path.is_file():
            return ("a folder" if path.is_dir() else "a broken link or no file"), "a file"
        if path.stat().st_size == 0:
            return "an empty file (0 bytes)", "an image"
        needed, size, finite = _scan(path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        return f"a damaged or truncated gzip stream ({error})", "a complete file"
    except Exception as error:  # nibabel and SimpleITK raise many types for a damaged header
        return f"an unreadable file ({describe(error)})", "an image"
    if size < needed:
        return f"a truncated file ({size} bytes of uncompressed data)", f"{needed} bytes according to its header"
    return None if finite else ("NaN or infinite values", "finite values")


def raw_array_problem(array: np.ndarray, spacing: Sequence[float], patch_dims: int) -> Problem | None:
    """What is wrong with the content of one raw file.

    Args:
        array: (C, Z, Y, X) as read by nnU-Net's readers.
        spacing: Voxel sizes in mm, three values.
        patch_dims: 2 or 3, of the configuration.
    """
    if array.ndim != 4 or min(array.shape) < 1:
        return f"an image of shape {array.shape[1:]}", "a 3D image, at least one voxel per axis"
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        return f"spacing {tuple(map(float, spacing))}", "three positive numbers (mm)"
    # nnU-Net's readers give two-dimensional images one slice of 999 times the pixel (or 999 mm).
    if patch_dims == 3 and array.shape[1] == 1 and spacing[0] >= 999:
        return "a 2D image", "a 3D image, because the configuration is 3D"
    if not np.isfinite(array).all():
        return "NaN or infinite values", "finite values"
    return None


def describe(error: Exception) -> str:
    """The type and last line of an error of a reader."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def _scan(path: Path) -> tuple[int, int, bool]:
    """Read a whole file, with the checksum at the end of a gzip stream.

    Returns:
        The uncompressed bytes that header and voxels take (0 for formats whose readers check that), the bytes that
        there are, and whether all voxels are finite (true where that is not looked at).
    """
    name = path.name.lower()
    with gzip.open(path) if name.endswith(".gz") else path.open("rb") as stream:
        header = _nifti_header(stream) if name.endswith((".nii", ".nii.gz")) else None
        if header is None:
            return 0, sum(len(part) for part in iter(lambda: stream.read(CHUNK), b"")), True
        dtype = header.get_data_dtype()
        offset = int(header.get_data_offset())
        voxels = math.prod(int(n) for n in header.get_data_shape()) * int(dtype.itemsize)
        stream.seek(0)
        size, finite = len(stream.read(offset)), True
        while part := stream.read(CHUNK):
            image = part[: max(0, offset + voxels - size)]
            if dtype.kind in "fc" and finite:
                whole = len(image) // dtype.itemsize * dtype.itemsize
                finite = bool(np.isfinite(np.frombuffer(image[:whole], dtype)).all())
            size += len(part)
    return offset + voxels, size, finite


def _nifti_header(stream: Any) -> Any:
    """The header, or `None` if it is none; nibabel.load would refuse odd orientations that readers accept."""
    from nibabel import Nifti1Header, Nifti2Header

    kinds = {348: Nifti1Header, 540: Nifti2Header}
    first = stream.read(4)
    stream.seek(0)
    kind = kinds.get(int.from_bytes(first, "little")) or kinds.get(int.from_bytes(first, "big"))
    return kind.from_fileobj(stream, check=False) if kind else None  # type: ignore[no-untyped-call]
