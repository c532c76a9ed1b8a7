"""Let nnU-Net find the KAF trainers and planners by name, without changing a file of nnU-Net.

nnU-Net looks for a class by importing its own modules one by one and asking `hasattr(module, name)`. This module
puts a finder on `sys.meta_path` that gives two of those modules a module-level `__getattr__` (PEP 562), which
imports our class when it is asked for by name.

It runs at every start of the interpreter, started by `nnunetv2_kaf_startup.pth` (or `.start`, PEP 829, from Python
3.15 on), so it imports nothing but built-in modules: no torch, no nnunetv2, no typing.
"""

import sys
from _thread import get_ident

# Spelled out instead of imported: typing alone would cost more than everything below.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# host module -> (prefix of the names that are ours, module that defines them) ..., of which the first prefix that fits
# decides. Prefixes and not a list of names, so that a new variant in a trainer module needs no change here.
HOSTS: "dict[str, tuple[tuple[str, str], ...]]" = {
    "nnunetv2.training.nnUNetTrainer.nnUNetTrainer": (
        ("nnUNetTrainerKAFSemi", "semisupervised.trainer"),
        ("nnUNetTrainerSemi", "semisupervised.trainer"),
        ("nnUNetTrainerKAF", "nnunetv2_kaf.trainer"),
    ),
    "nnunetv2.experiment_planning.experiment_planners.default_experiment_planner": (
        ("nnUNetPlannerKAF", "nnunetv2_kaf.planner"),
    ),
}
_MISSING = object()
_MARK = "_nnunetv2_kaf"


def _lookup(module_name: str, name: str) -> object:
    """Import one of our modules and return its attribute `name`, or `_MISSING`.

    Raises:
        ImportError: If the import itself dies of an AttributeError. `hasattr` in nnU-Net's search would swallow that
            one and nnU-Net would report an unknown trainer; any other error passes through unchanged.
    """
    from importlib import import_module

    try:
        module = import_module(module_name)
    except AttributeError as error:
        raise ImportError(f"{module_name} could not be imported: AttributeError: {error}", name=module_name) from error
    return getattr(module, name, _MISSING)


def extend(module: "ModuleType") -> None:
    """Give a host module the `__getattr__` that resolves our names; a second call changes nothing.

    Args:
        module: One of the modules named in `HOSTS`. An existing module-level `__getattr__` keeps answering for all
            names that are not ours.
    """
    namespace = vars(module)
    previous: Callable[[str], object] | None = namespace.get("__getattr__")
    if getattr(previous, _MARK, False):
        return
    ours = HOSTS[module.__name__]

    def __getattr__(name: str) -> object:  # noqa: N807 (the name that PEP 562 demands)
        for prefix, source in ours:
            if name.startswith(prefix):
                value = _lookup(source, name)
                if value is not _MISSING:
                    return value
                break
        if previous is not None:
            return previous(name)
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

    setattr(__getattr__, _MARK, True)
    namespace["__getattr__"] = __getattr__


class KAFFinder:
    """Meta path finder that finds nothing itself: it extends the two host modules right after they were executed."""

    def __init__(self) -> None:
        """Start with no lookup in progress."""
        self._active: set[tuple[int, str]] = set()

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """The spec that the finders behind this one give for a host module, with its loader extended.

        Args:
            fullname: Dotted name of the module that is being imported.
            path: `__path__` of its parent package.
            target: The module, in a reload.

        Returns:
            The spec, or None for every module that is no host module.
        """
        if fullname not in HOSTS:
            return None
        # Another plugin's finder may ask all finders, this one included: without the guard the two would call each
        # other for ever. The thread is part of the key so that a parallel import of the same module is still served.
        key = (get_ident(), fullname)
        if key in self._active:
            return None
        self._active.add(key)
        try:
            spec = self._ask_others(fullname, path, target)
        finally:
            self._active.discard(key)
        if spec is not None:
            _extend_after_execution(spec)
        return spec

    def _ask_others(
        self, fullname: str, path: "Sequence[str] | None", target: "ModuleType | None"
    ) -> "ModuleSpec | None":
        finders = list(sys.meta_path)
        # The finders in front of this one have already declined, so only those behind are asked. This includes the
        # finder of an editable nnunetv2.
        behind = finders[finders.index(self) + 1 :] if self in finders else finders
        for finder in behind:
            find_spec = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(fullname, path, target) if find_spec is not None else None
            if spec is not None:
                return spec
        return None


def _extend_after_execution(spec: "ModuleSpec") -> None:
    """Make `spec.loader` extend the host module after executing it; the loader keeps its type and methods."""
    loader = spec.loader
    execute: Callable[[ModuleType], None] | None = getattr(loader, "exec_module", None)
    if loader is None or execute is None:
        return

    def exec_module(module: "ModuleType") -> None:
        execute(module)
        # A loader can be shared by many modules (zipimport), so the name is checked again.
        if module.__name__ in HOSTS:
            extend(module)

    try:
        # On the instance: inspect, pickle and linecache still see the loader that they know.
        setattr(loader, "exec_module", exec_module)  # noqa: B010 (mypy rejects the assignment to a method)
    except (AttributeError, TypeError):
        # A loader that takes no attributes: nnU-Net itself must go on working. kaf-doctor reports that discovery is
        # off, and nnunetv2_kaf.activate() after the import of nnU-Net switches it on.
        return


def install() -> None:
    """Put the finder at the front of `sys.meta_path`; a second call changes nothing."""
    # Compared by name, because an editable install and a source checkout can each load their copy of this module.
    if not any(type(finder).__name__ == KAFFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, KAFFinder())
