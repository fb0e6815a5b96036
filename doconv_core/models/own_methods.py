"""Methods by which parts of a model make other layers of their own, as RepVGG's do."""

from __future__ import annotations

import inspect
import re
from typing import Any

from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.models.report import place

# As RepVGG, MobileOne, timm, YOLO, RepLKNet, torchvision and others call it.
_FUSING = re.compile(
    r"(switch|convert|transform|trans)_to_deploy|re_?param(eteri[sz]e)?(_\w+)?|structural_reparam"
    r"|fuse(_\w+|forward)?|merge_(kernel|bn|batchnorm|branch(es)?)|get_equivalent_kernel_bias"
)
# Those that `deploy` calls: without arguments, they leave a model for inference.
DEPLOYING = ("fuse", "reparameterize", "switch_to_deploy")


def fusing_methods(cls: type, packages: tuple[str, ...]) -> list[str]:
    """Return the names of a class's own methods by which its layers become other ones.

    packages: the beginnings of the names of modules whose classes have none.
    """
    if cls.__module__.startswith(packages):
        return []
    return [
        name
        for name in dir(cls)
        if _FUSING.fullmatch(name) and inspect.isfunction(getattr(cls, name, None))
    ]


def deploying_method(layer: Any, packages: tuple[str, ...]) -> str | None:
    """Return the name of the method that `deploy` calls of a layer, the first that there is."""
    names = fusing_methods(type(layer), packages)
    name = next((each for each in DEPLOYING if each in names), None)
    return name if name is not None and _takes_nothing(getattr(layer, name)) else None


def call_own(path: str, kind: str, layer: Any, name: str) -> Any:
    """Return what a layer's method returns; NotFoldable where it raises."""
    try:
        return getattr(layer, name)()
    except Exception as error:  # whatever the model's own code raises
        raise NotFoldable(
            f"{place(path)}: {kind}.{name}() raised {type(error).__name__}: {error}"
        ) from error


def _takes_nothing(method: Any) -> bool:
    """Return whether a method can be called without arguments."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(
        p.default is not inspect.Parameter.empty or p.kind in variable
        for p in inspect.signature(method).parameters.values()
    )
