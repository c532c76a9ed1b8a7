import pytest
import torch

from nnunetv2_kaf.precision import autocast


def product() -> torch.dtype:
    matrix = torch.ones(2, 2)
    return (matrix @ matrix).dtype


def test_on_off_and_off_inside_on() -> None:
    with autocast("cpu", torch.bfloat16):
        assert product() == torch.bfloat16
        with autocast("cpu"):
            assert product() == torch.float32
    with autocast("cpu"):
        assert product() == torch.float32


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_devices_without_autocast_are_never_named_to_torch(
    dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("User specified an unsupported autocast device_type 'mps'")

    monkeypatch.setattr(torch, "autocast", refuse)
    with autocast("mps", dtype):
        assert product() == torch.float32
