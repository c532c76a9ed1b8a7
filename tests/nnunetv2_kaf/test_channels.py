from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunetv2_kaf import channels
from nnunetv2_kaf.errors import KAFError


@pytest.mark.parametrize("kernel", [(3, 3), (1, 3, 3)])
def test_repeated_channels_answer_equal_channels_alike(kernel: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 1, *kernel, generator=generator, dtype=torch.float64)
    image = torch.randn(2, 1, *[6] * len(kernel), generator=generator, dtype=torch.float64)
    convolve = getattr(nn.functional, f"conv{len(kernel)}d")
    repeated = channels.repeat_input_channels(weight, 4)
    assert repeated.shape == (5, 4, *kernel)
    torch.testing.assert_close(convolve(image.repeat(1, 4, *[1] * len(kernel)), repeated), convolve(image, weight))
    assert channels.repeat_input_channels(repeated, 4) is repeated
    for count in (1, 5):
        with pytest.raises(KAFError, match=rf"found weights for 4, expected 1 .* or {count}"):
            channels.repeat_input_channels(repeated, count)


def test_padded_channels_are_ignored() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, image = (torch.randn(4, 2, 3, 3, generator=generator) for _ in range(2))
    fused = torch.cat((image, torch.randn(4, 3, 3, 3, generator=generator)), dim=1)
    conv2d = nn.functional.conv2d
    torch.testing.assert_close(conv2d(fused, channels.pad_input_channels(weight, 5)), conv2d(image, weight))
    assert torch.equal(channels.pad_input_channels(weight, 2), weight)
    with pytest.raises(KAFError, match="found weights for 2, expected at most 1"):
        channels.pad_input_channels(weight, 1)


def test_identity_projection_hands_on_the_first_channels() -> None:
    fused = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    projection = channels.identity_projection(torch.empty(3, 6, 1, 1))
    assert torch.equal(nn.functional.conv2d(fused, projection), fused[:, :3])


@pytest.mark.parametrize(("old", "new"), [((3, 3), (1, 3)), ((5, 3), (3, 3)), ((3, 3), (5, 3)), ((1, 3), (3, 5))])
def test_a_resized_kernel_answers_alike_where_nothing_changes(old: tuple[int, int], new: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 2, *old, generator=generator)
    resized = channels.resize_kernel(weight, new)
    assert tuple(resized.shape) == (4, 2, *new)
    # a signal that does not change along the axes that became smaller
    image = torch.randn(1, 2, *[1 if n < o else 9 for o, n in zip(old, new, strict=True)], generator=generator)
    image = image.expand(1, 2, 9, 9)
    before, after = (nn.functional.conv2d(image, w, padding=[n // 2 for n in w.shape[2:]]) for w in (weight, resized))
    torch.testing.assert_close(after[..., 2:-2, 2:-2], before[..., 2:-2, 2:-2])
    assert torch.equal(channels.resize_kernel(weight, old), weight)


def test_kernels_without_a_centre_and_of_other_axes() -> None:
    weight = torch.zeros(4, 2, 2, 3)
    assert torch.equal(channels.resize_kernel(weight, (2, 3)), weight)
    with pytest.raises(KAFError, match=r"\[2, 3\] in the file, \[3, 3\] here: an even size"):
        channels.resize_kernel(weight, (3, 3))
    with pytest.raises(KAFError, match="kernel of 2 axes in the file, 3 here"):
        channels.resize_kernel(weight, (3, 3, 3))
