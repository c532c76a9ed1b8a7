"""Build a KAF network, run a volume and draw its keypoints: `python examples/keypoints.py keypoints.png`."""

import sys

import numpy as np
import torch
from matplotlib.figure import Figure
from phantoms import PhantomConfig, make_phantom
from torch import nn

from nnunetv2_kaf import KAFConfig, KAFUNet

volume = make_phantom(PhantomConfig(), np.random.default_rng(0)).images
image = torch.from_numpy((volume - volume.mean()) / volume.std())[None]  # (1, 1, 20, 64, 64)

network = KAFUNet(
    input_channels=1, num_classes=4, n_stages=4, features_per_stage=(16, 32, 64, 128), conv_op=nn.Conv3d,
    kernel_sizes=3, strides=((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2)), n_conv_per_stage=2,
    n_conv_per_stage_decoder=2, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU,
    kaf=KAFConfig(num_keypoints=256), spacing=(3.0, 1.5, 1.5),
).apply(KAFUNet.initialize).eval()  # fmt: skip

with torch.no_grad():
    logits = network(image)
    keypoints = network.encoder.detector(image)
points = keypoints.coords[keypoints.valid].numpy()  # (N, 3) voxels, strongest first
sys.stdout.write(f"{len(points)} keypoints; logits {tuple(logits.shape)}\n")

axes = (figure := Figure(figsize=(5, 5))).add_subplot()
axes.imshow(image[0, 0, 10].numpy(), cmap="gray")
near = np.abs(points[:, 0] - 10) <= 1  # of the middle slice and its neighbours
axes.scatter(points[near, 2], points[near, 1], facecolors="none", edgecolors="cyan")
figure.savefig(sys.argv[1])
