"""Keypoint-augmented fusion layers and self-supervised pretraining for nnU-Net v2.

Importing this package imports neither torch nor nnunetv2: `KAFConfig`, `KAFUNet` and `KeypointDetector` are imported
when they are asked for.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from nnunetv2_kaf.errors import KAFError

if TYPE_CHECKING:
    from nnunetv2_kaf.config import KAFConfig
    from nnunetv2_kaf.keypoints import KeypointDetector
    from nnunetv2_kaf.unet import KAFUNet

__version__ = "0.1.0"
__all__ = ["KAFConfig", "KAFError", "KAFUNet", "KeypointDetector", "__version__", "activate"]
_HOMES = {"KAFConfig": "config", "KAFUNet": "unet", "KeypointDetector": "keypoints"}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def activate() -> None:
    """Let nnU-Net find the KAF trainers and planners in this process.

    A normal `pip install` does this at every start of the interpreter, so nothing needs to be called. Call it once
    where start-up files are not read: under `python -S`, after `pip install --target`, or in a notebook kernel that
    was running before the installation. Modules of nnU-Net that are already imported are extended, too. Calling it
    again changes nothing.

    Raises:
        KAFError: If the start-up module of this package is not installed.
    """
    try:
        import nnunetv2_kaf_startup as startup
    except ModuleNotFoundError as error:
        raise KAFError(
            "activate() needs the module nnunetv2_kaf_startup, which is installed next to nnunetv2_kaf, and did not "
            "find it on sys.path. Install the package instead of adding its source folder to the path: "
            "pip install nnunetv2-kaf (or pip install -e <source folder>)."
        ) from error
    startup.install()
    for name in startup.HOSTS:
        module = sys.modules.get(name)
        if module is not None:
            startup.extend(module)
