from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_kaf.errors import KAFError
from pretraining.data.bad_images import BadImages
from pretraining.data.raw_checks import inspect_case, raw_array_problem, raw_file_problem

IMAGE = np.random.default_rng(0).normal(size=(6, 14, 10)).astype(np.float32)


def write(path: Path, image: np.ndarray = IMAGE, spacing: Sequence[float] = (1.0, 2.0, 4.0), **kwargs: Any) -> Path:
    volume = sitk.GetImageFromArray(image, **kwargs)
    volume.SetSpacing([float(s) for s in spacing])  # x, y, z
    sitk.WriteImage(volume, str(path))
    return path


def inspect(files: Sequence[Path], channels: int = 1, dims: int = 3, reader: Any = SimpleITKIO) -> tuple[Any, str]:
    """Spacing and the list of what is wrong."""
    bad = BadImages()
    spacing = inspect_case(files, reader, channels, dims, bad)
    try:
        bad.finish(skip_bad=False)
    except KAFError as error:
        assert spacing is None
        return None, str(error)
    assert spacing is not None
    return spacing, ""


ENDINGS = [".nii.gz", ".nii", ".nrrd", ".mha"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_good_file_passes(tmp_path: Path, ending: str) -> None:
    spacing, wrong = inspect([write(tmp_path / f"a_0000{ending}")])
    assert wrong == ""
    assert spacing == pytest.approx((4.0, 2.0, 1.0))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97, 0.9999])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_truncated_file_is_found(tmp_path: Path, ending: str, share: float) -> None:
    path = write(tmp_path / f"a_0000{ending}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    spacing, wrong = inspect([path])
    assert spacing is None
    assert str(path) in wrong
    if ending == ".nii.gz":
        assert "truncated gzip stream" in wrong


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
def test_a_complete_gzip_of_half_an_image_is_found(tmp_path: Path, reader: Any) -> None:
    whole = write(tmp_path / "a_0000.nii").read_bytes()
    path = tmp_path / "b_0000.nii.gz"
    path.write_bytes(gzip.compress(whole[: len(whole) // 2]))
    assert "truncated file" in inspect([path], reader=reader)[1]
    path.write_bytes(gzip.compress(whole))
    assert inspect([path], reader=reader)[1] == ""
    path.write_bytes(gzip.compress(whole)[:-1])  # all voxels are there, the checksum is not
    assert "truncated gzip stream" in inspect([path], reader=reader)[1]


def test_a_flipped_bit_in_a_gzip_stream_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a_0000.nii.gz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    assert "damaged or truncated gzip" in inspect([path])[1]


@pytest.mark.parametrize("kind", ["int16", "rgb", "big_endian", "double"])
def test_sizes_of_other_voxel_types(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a_0000.nii"
    if kind == "rgb":
        write(path, np.zeros((3, 4, 5, 3), np.uint8), isVector=True)
    elif kind == "big_endian":
        import nibabel

        header = nibabel.Nifti1Header(endianness=">")
        nibabel.save(nibabel.Nifti1Image(IMAGE.T, np.eye(4), header), path)
    else:
        write(path, IMAGE.astype({"int16": np.int16, "double": np.float64}[kind]))
    assert raw_file_problem(path) is None
    path.write_bytes(path.read_bytes()[:-1])
    problem = raw_file_problem(path)
    assert problem is not None
    assert "truncated" in problem[0]


def test_files_that_are_no_images(tmp_path: Path) -> None:
    folder, empty, link, text = (tmp_path / f"{n}_0000.nii.gz" for n in ("folder", "empty", "link", "text"))
    folder.mkdir()
    empty.touch()
    link.symlink_to(tmp_path / "nowhere")
    text.write_text("no image at all, but long enough to hold a header" * 20)
    plain = tmp_path / "plain_0000.nii"
    plain.write_text("no image at all, but long enough to hold a header" * 20)
    for path, found in {
        folder: "a folder",
        empty: r"0 bytes",
        link: "broken link",
        text: "gzip",
        plain: "unreadable file",
    }.items():
        assert found in inspect([path])[1]


@pytest.mark.parametrize("chunk", [16, 1 << 20])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(
    tmp_path: Path, value: float, ending: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NIfTI readers may replace them, so that the array alone does not tell."""
    monkeypatch.setattr("pretraining.data.raw_checks.CHUNK", chunk)
    for position in ((0, 0, 0), (5, 13, 9)):
        image = IMAGE.copy()
        image[position] = value
        path = write(tmp_path / f"a_0000{ending}", image)
        assert "NaN or infinite" in inspect([path])[1]


def test_bytes_behind_the_voxels_are_none_of_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a_0000.nii")
    path.write_bytes(path.read_bytes() + np.float32(np.nan).tobytes() * 9)
    assert inspect([path])[1] == ""


def test_2d_images_fit_2d_configurations_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a_0000.nii.gz", IMAGE[0], (1.0, 2.0))
    assert inspect([path], dims=2)[1] == ""
    assert "a 2D image" in inspect([path], dims=3)[1]
    one_slice = write(tmp_path / "b_0000.nii.gz", IMAGE[:1], (1.0, 1.0, 5.0))
    assert inspect([one_slice], dims=3)[1] == ""


def test_4d_images_are_channels_too_many(tmp_path: Path) -> None:
    path = tmp_path / "a_0000.nii.gz"
    series = sitk.JoinSeries([sitk.GetImageFromArray(IMAGE + i) for i in range(3)])
    sitk.WriteImage(series, str(path))
    assert "3 channel(s) in 1 file(s); expected 1" in inspect([path])[1]


def test_arrays() -> None:
    good = np.ones((1, 2, 3, 4), np.float32)
    assert raw_array_problem(good, (1, 1, 1), 3) is None
    for array, spacing, found in [
        (good[:, :0], (1, 1, 1), "(0, 3, 4)"),
        (good[0], (1, 1, 1), "shape (3, 4)"),
        (good[None], (1, 1, 1), "shape (1, 2, 3, 4)"),
        (good, (0, 1, 1), "spacing (0.0"),
        (good, (1, float("nan"), 1), "spacing (1.0, nan"),
        (good, (1, 1), "spacing (1.0, 1.0)"),
    ]:
        problem = raw_array_problem(array, spacing, 3)
        assert problem is not None
        assert found in problem[0]


def test_channels_must_be_complete_and_alike(tmp_path: Path) -> None:
    a = [write(tmp_path / f"a_{i:04d}.nii.gz", IMAGE + i) for i in range(3)]
    assert inspect(a[:2], channels=2)[1] == ""
    assert "1 channel(s) in 1 file(s); expected 2" in inspect(a[:1], channels=2)[1]
    assert "3 channel(s) in 3 file(s); expected 2" in inspect(a, channels=2)[1]
    assert "the channel(s) 0000, 0002" in inspect([a[0], a[2]], channels=2)[1]
    shape = write(tmp_path / "b_0001.nii.gz", IMAGE[:, 1:])
    assert "shape (6, 13, 10)" in inspect([a[0], shape], channels=2)[1]
    spacing = write(tmp_path / "c_0001.nii.gz", spacing=(1.0, 2.0, 4.1))
    assert "and spacing (4." in inspect([a[0], spacing], channels=2)[1]


def test_all_bad_files_of_a_case_are_named(tmp_path: Path) -> None:
    files = [write(tmp_path / f"a_{i:04d}.nii.gz") for i in range(3)]
    files[0].write_bytes(b"")
    write(files[2], np.full_like(IMAGE, np.nan))
    wrong = inspect(files, channels=3)[1]
    assert "2 bad image(s)" in wrong
    assert "a_0000" in wrong
    assert "a_0002" in wrong
