import dataclasses
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.abstract_arch import test_submodules_loadable as submodules_loadable
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.unet import KAFUNet

PAPER = KAFConfig.paper(num_keypoints=12, token_dim=8, num_blocks=2, position_hidden=(8,))
SMALL = KAFConfig(num_keypoints=12, token_dim=16, num_blocks=1, position_hidden=(8,))
CONCAT = dataclasses.replace(SMALL, fusion="concat", diffusion_channels=5)
CASES = [(ndim, backbone) for ndim in (2, 3) for backbone in ("plain", "residual")]
Build = Callable[..., Any]


def transfer(plain: nn.Module, kaf: KAFUNet) -> None:
    """Plain weights by name; where an input is wider the skip's own channels come last but one half."""
    source, target = plain.state_dict(), kaf.state_dict()
    with torch.no_grad():
        for name, value in source.items():
            wider = target[name]
            if wider.shape == value.shape:
                wider.copy_(value)
                continue
            extra = wider.shape[1] - value.shape[1]
            assert extra > 0
            # the diffused map is appended after the channels that the plain network has
            wider[:, : value.shape[1]] = value
            wider[:, value.shape[1] :] = 7.0


@pytest.mark.parametrize(("ndim", "backbone"), CASES)
def test_add_at_initialisation_equals_the_plain_unet(
    ndim: int, backbone: str, build_plain: Build, build_kaf: Build, random_image: Build
) -> None:
    plain, kaf = build_plain(ndim, backbone), build_kaf(ndim, SMALL, backbone)
    report = kaf.load_state_dict(plain.state_dict(), strict=False)
    assert report.unexpected_keys == []
    assert all(".layers." in key for key in report.missing_keys)
    image = random_image(ndim)
    assert kaf.encoder.detector(image).valid.all()
    torch.testing.assert_close(kaf(image), plain(image))


@pytest.mark.parametrize(("ndim", "backbone"), CASES)
@pytest.mark.parametrize("config", [SMALL, CONCAT], ids=["add", "concat"])
def test_zero_keypoints_equal_the_plain_unet(
    ndim: int, backbone: str, config: KAFConfig, build_plain: Build, build_kaf: Build, random_image: Build,
    randomize: Build,
) -> None:  # fmt: skip
    plain, kaf = build_plain(ndim, backbone), build_kaf(ndim, config, backbone)
    randomize(kaf.encoder.layers)
    transfer(plain, kaf)
    constant = torch.full_like(random_image(ndim), 2.0)
    assert not kaf.encoder.detector(constant).valid.any()
    torch.testing.assert_close(kaf(constant), plain(constant))
    image = random_image(ndim)
    assert not torch.allclose(kaf(image), plain(image)), "with keypoints the layers must matter"


@pytest.mark.parametrize(("ndim", "backbone"), CASES)
@pytest.mark.parametrize("config", [SMALL, CONCAT], ids=["add", "concat"])
def test_batch_mates_do_not_matter(
    ndim: int, backbone: str, config: KAFConfig, build_kaf: Build, random_image: Build, randomize: Build
) -> None:
    network = build_kaf(ndim, config, backbone).double()
    randomize(network)
    image = random_image(ndim, batch=3).double()
    image[1] = 0.5  # no keypoints at all
    together = network(image)
    for i in range(3):
        torch.testing.assert_close(network(image[i : i + 1])[0], together[i])


@pytest.mark.parametrize(("ndim", "backbone"), CASES)
@pytest.mark.parametrize("config", [SMALL, CONCAT], ids=["add", "concat"])
def test_deep_supervision_and_gradients(
    ndim: int, backbone: str, config: KAFConfig, build_kaf: Build, random_image: Build
) -> None:
    network = build_kaf(ndim, config, backbone, deep_supervision=True)
    image = random_image(ndim)
    outputs = network(image)
    assert [o.shape[0:2] for o in outputs] == [(2, 3)] * 2
    assert outputs[0].shape[2:] == image.shape[2:]
    sum(o.square().mean() for o in outputs).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    network.decoder.deep_supervision = False
    torch.testing.assert_close(network(image), outputs[0])


@pytest.mark.parametrize("backbone", ["plain", "residual"])
def test_pretrained_encoder_sharing_tools_find_the_parts(backbone: str, build_kaf: Build) -> None:
    submodules_loadable(build_kaf(3, SMALL, backbone))


@pytest.mark.parametrize("ndim", [2, 3])
def test_built_from_plan_json_alone(ndim: int, build_kaf: Build) -> None:
    norm = f"torch.nn.InstanceNorm{ndim}d"
    arguments = {
        "n_stages": 2, "features_per_stage": [4, 6], "conv_op": f"torch.nn.Conv{ndim}d", "kernel_sizes": 3,
        "strides": [1, 2], "n_conv_per_stage": 1, "n_conv_per_stage_decoder": 1, "conv_bias": True, "norm_op": norm,
        "norm_op_kwargs": {"affine": True}, "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.ReLU",
        "nonlin_kwargs": {}, "spacing": [2.0] * ndim, "kaf": {"num_keypoints": 5},
    }  # fmt: skip
    imports = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    network = get_network_from_plans("nnunetv2_kaf.unet.KAFUNet", arguments, imports, 2, 3, deep_supervision=False)
    assert network(torch.randn(1, 2, *[12] * ndim)).shape == (1, 3, *[12] * ndim)


def test_tokens_and_skips_of_the_encoder(build_kaf: Build, random_image: Build) -> None:
    encoder = build_kaf(3, CONCAT).encoder
    out = encoder.forward_features(random_image(3))
    assert encoder.kaf_levels == (0, 1)
    assert [tuple(s.shape[1:]) for s in out.skips] == [(8, 8, 16, 24), (12, 8, 8, 12), (8, 4, 4, 6)]
    assert [tuple(t.shape) for t in out.tokens] == [(2, 12, 16)] * 2
    given = encoder.forward_features(random_image(3), out.keypoints)
    torch.testing.assert_close(given.skips, out.skips)


def test_paper_preset_runs_with_one_level(build_kaf: Build, random_image: Build) -> None:
    network = build_kaf(2, KAFConfig.paper(num_keypoints=12, num_blocks=2, levels=(1,)))
    assert network.encoder.kaf_levels == (1,)
    assert network(random_image(2)).shape == (2, 3, 24, 40)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("config", [SMALL, PAPER], ids=["add", "paper"])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_breaks(
    ndim: int, config: KAFConfig, training: bool, build_kaf: Build, random_image: Build, randomize: Build
) -> None:
    torch._dynamo.reset()
    network = build_kaf(ndim, config).train(training)
    randomize(network)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    image: Tensor = random_image(ndim)
    if training:
        compiled(image).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), network(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_default_backend_compiles_training_and_prediction(
    ndim: int, build_kaf: Build, random_image: Build, randomize: Build
) -> None:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU, and none is here")
    torch._dynamo.reset()
    network = build_kaf(ndim, dataclasses.replace(SMALL, levels=(0,)))  # one level: compiling takes half a minute
    randomize(network)
    image = random_image(ndim)
    network(image).square().mean().backward()
    # with deep supervision off the lower heads take no part
    expected = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    compiled = torch.compile(network, fullgraph=True)
    compiled(image).square().mean().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), network(image), rtol=1e-4, atol=1e-5)


class _Operators(TorchDispatchMode):
    """Collects the names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("config", [SMALL, PAPER], ids=["default", "paper"])
def test_nothing_makes_the_host_wait_for_the_device(
    ndim: int, config: KAFConfig, build_kaf: Build, random_image: Build
) -> None:
    network, image = build_kaf(ndim, config), random_image(ndim)
    with _Operators() as ran:
        network(image).sum().backward()
    # reading a value back, shapes that depend on values (`index` by a mask), constants made on the host
    waiting = {"_local_scalar_dense", "item", "is_nonzero", "equal", "lift_fresh", "lift_fresh_copy"}
    waiting |= {"index", "nonzero", "masked_select", "_unique2", "unique_dim"}
    assert not ran.names & waiting
    with _Operators() as ran:
        torch.tensor([1.0, 2.0]).nonzero().sum().item()
    assert {"lift_fresh", "nonzero", "_local_scalar_dense"} <= ran.names, "the operators' names have changed"


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch is built without CUDA")
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("config", [SMALL, PAPER], ids=["default", "paper"])
def test_everything_is_on_the_device_of_the_image(ndim: int, config: KAFConfig, build_kaf: Build) -> None:
    # tensors without content: CUDA's operators and their rules, without a CUDA device
    with FakeTensorMode(), torch.device("cuda"):
        network = build_kaf(ndim, config)
        image = torch.randn(2, 1, *(16, 16, 24)[-ndim:])
        assert network(image).device.type == "cuda"


@pytest.mark.parametrize(("ndim", "backbone"), CASES)
def test_activation_checkpointing_changes_memory_only(
    ndim: int, backbone: str, build_kaf: Build, random_image: Build
) -> None:
    plain = build_kaf(ndim, SMALL, backbone)
    saving = build_kaf(ndim, dataclasses.replace(SMALL, activation_checkpointing=True), backbone)
    assert list(saving.state_dict()) == list(plain.state_dict())
    saving.load_state_dict(plain.state_dict())
    assert saving.compute_conv_feature_map_size((16, 16, 24)[:ndim]) == plain.compute_conv_feature_map_size(
        (16, 16, 24)[:ndim]
    )
    kept = []
    for network in (plain, saving):
        network.train()
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: (saved.append(t), t)[1], lambda t: t):
            loss = network(random_image(ndim)).square().mean()
        loss.backward()
        kept.append(sum({t.data_ptr(): t.nbytes for t in saved}.values()))
    assert kept[1] < 0.8 * kept[0]
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_memory_estimate_counts_the_layers(build_kaf: Build, build_plain: Build) -> None:
    size = (8, 16, 24)
    plain = build_plain(3).compute_conv_feature_map_size(size)
    add = build_kaf(3, SMALL).compute_conv_feature_map_size(size)
    # half of what is kept: at each level a map of C channels (4 at full resolution, 6 at (8, 8, 12)), per keypoint its
    # feature vector, the position encoding's hidden values and what the blocks keep of 15 tokens of 16
    levels = ((4, 8 * 16 * 24), (6, 8 * 8 * 12))
    assert add - plain == sum((channels * voxels + 12 * (channels + 16 + 15 * 16)) // 2 for channels, voxels in levels)
    assert build_kaf(3, CONCAT).compute_conv_feature_map_size(size) > add


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": (2,)}, r"levels: found \(2,\), expected levels from 0 to 1"),
        ({"detection_channels": (0, 1)}, r"detection_channels: found \(0, 1\).*1 input channel"),
        ({"num_keypoints": 4000}, r"num_keypoints: found 4000, more than the 3072 voxels"),
    ],
)
def test_config_that_does_not_fit_is_named(
    change: dict[str, Any], message: str, build_kaf: Build, random_image: Build
) -> None:
    with pytest.raises(KAFError, match=message):
        build_kaf(3, dataclasses.replace(SMALL, **change))(random_image(3))
