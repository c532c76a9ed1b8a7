"""Networks built from what a file says, without letting the file choose what is imported or called.

Plans and checkpoints name classes by dotted path. nnU-Net imports and calls whatever is named there, so that a file
could run any command. Here the names are looked up in short lists: our network and nnU-Net's UNets, and torch's modules
for convolution, normalisation, dropout and non-linearity. Nothing is imported by name; everything else in the file has
to be a plain value; and the size of the network is known before memory is taken for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from dynamic_network_architectures.architectures import unet as unets
from dynamic_network_architectures.building_blocks import residual
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from nnunetv2_kaf.errors import KAFError, one_line
from nnunetv2_kaf.schema_check import check
from nnunetv2_kaf.schema_plans import ArchitectureEntry
from nnunetv2_kaf.unet import KAFUNet

NETWORK_CLASS = "nnunetv2_kaf.unet.KAFUNet"
_UNETS = ("PlainConvUNet", "ResidualEncoderUNet")
_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
_NORMS = (
    "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GroupNorm",
    "SyncBatchNorm",
)  # fmt: skip
_DROPOUTS = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")
_NONLINEARITIES = (
    "CELU", "ELU", "GELU", "GLU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "Identity", "LeakyReLU",
    "LogSigmoid", "Mish", "PReLU", "RReLU", "ReLU", "ReLU6", "SELU", "Sigmoid", "SiLU", "Softplus", "Softshrink",
    "Softsign", "Tanh", "Tanhshrink",
)  # fmt: skip
# option -> names that it may have, and the class that what they name must be derived from
OPERATORS: dict[str, tuple[tuple[str, ...], tuple[type[nn.Module], ...]]] = {
    "conv_op": (_CONVOLUTIONS, (_ConvNd,)),
    "norm_op": (_NORMS, (_NormBase, nn.GroupNorm)),
    "dropout_op": (_DROPOUTS, (_DropoutNd,)),
    "nonlin": (_NONLINEARITIES, (nn.Module,)),
}
_BLOCKS = {"BasicBlockD": residual.BasicBlockD, "BottleneckD": residual.BottleneckD}


def build_network(
    entry: Mapping[str, Any],
    input_channels: int,
    outputs: int,
    *,
    where: str,
    deep_supervision: bool = True,
    initialize: bool = True,
) -> nn.Module:
    """Build the network that an `architecture` entry describes.

    Args:
        entry: `network_class_name`, `arch_kwargs` and `_kw_requires_import`, as in nnU-Net's plans.
        input_channels: Channels of the network's input.
        outputs: Segmentation heads.
        where: File and place, for messages.
        deep_supervision: Outputs of all decoder levels.
        initialize: Apply the network's own initialisation of weights.

    Raises:
        KAFError: The entry names something else than a known network or operator, its options do not fit together, or
            the network does not fit into memory. Nothing was imported or called then.
    """
    network_class, arguments = resolve(entry, where)

    def build() -> nn.Module:
        network: nn.Module = network_class(
            input_channels=input_channels,
            num_classes=outputs,
            **{**arguments, "deep_supervision": deep_supervision},
        )
        return network

    try:
        with torch.device("meta"):
            _check_size(build(), where)
        network = build()
        if initialize:
            network.apply(network.initialize)  # type: ignore[arg-type]
    except (TypeError, ValueError, AssertionError, IndexError, KeyError, RuntimeError, AttributeError) as error:
        if isinstance(error, KAFError):
            raise KAFError(f"{where}: {error}") from error
        raise KAFError(
            f"{where}: architecture: no {network_class.__name__} can be built with these options "
            f"({type(error).__name__}: {one_line(error) or 'no details'}). Restore the file, or plan again."
        ) from error
    return network


def resolve(entry: Mapping[str, Any], where: str) -> tuple[type[nn.Module], dict[str, Any]]:
    """The class and the arguments of a network, with operators in place of their names.

    Raises:
        KAFError: See `build_network`.
    """
    check(ArchitectureEntry, entry, f"{where}: architecture", "Restore the file, or plan again.")
    arguments = dict(entry["arch_kwargs"])
    network_class = network_class_of(entry["network_class_name"], where)
    for name in entry["_kw_requires_import"]:
        if name not in (*OPERATORS, "block"):
            raise KAFError(
                f"{where}: architecture._kw_requires_import: found {name!r}, expected names among "
                f"{[*OPERATORS, 'block']}. Other options are not imported from a file; take the name out."
            )
    for option in OPERATORS:
        if option in arguments:
            arguments[option] = operator(option, arguments[option], where)
    if arguments.get("block") is not None:
        arguments["block"] = _lookup(
            "block", arguments["block"], _BLOCKS, "dynamic_network_architectures.building_blocks.residual", where
        )
    return network_class, arguments


def network_class_of(name: object, where: str) -> type[nn.Module]:
    """The network class that a file names.

    Raises:
        KAFError: It is none of ours or nnU-Net's UNets.
    """
    package, _, last = name.rpartition(".") if isinstance(name, str) else ("", "", "")
    if name == NETWORK_CLASS:
        return KAFUNet
    # in any of its modules: nnU-Net finds them by their last name as well, after they moved
    if last in _UNETS and package.startswith("dynamic_network_architectures.architectures."):
        found: type[nn.Module] = getattr(unets, last)
        return found
    raise KAFError(
        f"{where}: architecture.network_class_name: found {name!r}, expected {NETWORK_CLASS} or "
        f"dynamic_network_architectures.architectures.unet.{' or '.join(_UNETS)}. A network of another kind is not "
        "built from a file."
    )


def operator(option: str, name: object, where: str) -> type[nn.Module] | None:
    """The torch module that a file names as an operator; None stays None.

    Raises:
        KAFError: It is no module of torch for this purpose.
    """
    if name is None and option != "conv_op":
        return None
    names, bases = OPERATORS[option]
    found = _lookup(option, name, {last: getattr(nn, last) for last in names}, "torch.nn", where)
    if not issubclass(found, bases):  # the list above is right; this says so where it is used
        raise KAFError(f"{where}: architecture.arch_kwargs.{option}: {name!r} is no {bases[0].__name__}.")
    return found


def _lookup(
    option: str, name: object, allowed: Mapping[str, type[nn.Module]], package: str, where: str
) -> type[nn.Module]:
    for last, found in allowed.items():
        if name in (f"{package}.{last}", f"{found.__module__}.{found.__qualname__}") or name is found:
            return found
    raise KAFError(
        f"{where}: architecture.arch_kwargs.{option}: found {name!r}, expected one of {package}."
        f"{{{', '.join(allowed)}}}{' or null' if option != 'conv_op' else ''}. Nothing else is imported from a file; "
        "restore it, or plan again."
    )


def _check_size(network: nn.Module, where: str) -> None:
    """Raise a KAFError if the tensors of a network (on the device "meta", without memory) do not fit into memory."""
    tensors = {id(t): t for t in (*network.parameters(), *network.buffers())}
    needed = sum(t.numel() * t.element_size() for t in tensors.values())
    if needed > memory():
        raise KAFError(
            f"the network needs {needed / 2**30:.1f} GiB for its weights alone, expected at most the "
            f"{memory() / 2**30:.1f} GiB of this machine. Correct the sizes in arch_kwargs"
        )


@cache
def memory() -> int:
    """Main memory of this machine in bytes; a terabyte where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**40
