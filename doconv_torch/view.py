"""A PyTorch model as the core's tools see it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from doconv_core.kinds.base import ComposedKind
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.models.own_methods import call_own
from doconv_core.models.report import READ, place
from doconv_core.models.view import Flow, ModelView, Site
from doconv_torch import batchnorm, branches, graph
from doconv_torch.kinds import LAYER_KINDS
from doconv_torch.ordinary import (
    check_model,
    count_parameters,
    is_batch_norm,
    is_convolution,
    is_hooked,
    kind_of,
    memory,
    obstacle,
    owners,
    spec_of,
)
from doconv_torch.surgery import copied


class View(ModelView):
    """A module and all below it. Raises TypeError for what is none, or wrapped in DDP or FSDP."""

    model: nn.Module
    batch_norm, packages = _BatchNorm, ("torch.", "doconv_torch.")
    name_of, is_convolution = staticmethod(kind_of), staticmethod(is_convolution)
    obstacle, outline = staticmethod(obstacle), staticmethod(spec_of)
    is_batch_norm = staticmethod(is_batch_norm)
    norm_obstacle, fuse = staticmethod(batchnorm.any_norm_obstacle), staticmethod(batchnorm.fuse)

    def __init__(self, model: nn.Module) -> None:
        check_model(model)
        self.model = model
        self._flow: graph.Flow | None = None
        self._owners: Any = None

    def sites(self) -> list[Site]:
        """Return every module once, in the order of `named_modules`."""
        paths: dict[nn.Module, list[str]] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            paths.setdefault(module, []).append(path)
        return [Site(places[0], tuple(places), module) for module, places in paths.items()]

    def below(self, layer: nn.Module) -> list[nn.Module]:
        """Return the modules inside a module."""
        return list(layer.modules())[1:]

    def holders(self, layer: Any) -> list[Any]:
        """Return the modules that have the very weight; None for what has its memory otherwise."""
        if self._owners is None:
            self._owners = owners(self.model)
        return [
            module if name == "weight" and parameter is layer.weight else None
            for module, name, parameter in self._owners[memory(layer.weight)]
        ]

    def other_use(self, layer: Any) -> str | None:
        """Return whether the model's code is seen to read a convolution's weight itself."""
        names = layer._parameters.keys() - {"bias"}
        return READ if any((layer, name) in self._seen.touched for name in names) else None

    @property
    def _seen(self) -> graph.Flow:
        """What symbolic tracing sees of the model as it was when first asked."""
        if self._flow is None:
            self._flow = graph.flow(self.model)
        return self._flow

    def count(self) -> int:
        """Return how many numbers the parameters have."""
        return count_parameters(self.model)

    def uncounted(self) -> int:
        """Return how many parameters are lazy, and have no shape yet."""
        return sum(map(nn.parameter.is_lazy, self.model.parameters()))

    def copied(self, given_up: Sequence[Any] = ()) -> View:
        """Return the view of a deep copy; TypeError where the model cannot be copied."""
        return View(copied(self.model, given_up))

    def check_known(self, site: Site, forms: Mapping[str, str]) -> None:
        """Raise NotFoldable for a kind's layer that was traced, exported or compiled."""
        if not isinstance(site.layer, torch.jit.ScriptModule):
            _check_no_entries(site)
            return
        name = kind_of(site.layer)
        for kind, layers in LAYER_KINDS.items():
            if name in layers.type_names and forms[kind] != layers.kept:
                raise NotFoldable(
                    f"{place(site.path)} is a {name} that was compiled to TorchScript; fold the "
                    "model first, and compile it afterwards."
                )

    def warn_of_training(self, stacklevel: int) -> None:
        """Warn of a model in training mode whose layers vary from call to call."""
        modules = self.model.named_modules()
        varying = [f"{place(path)} ({kind_of(m)})" for path, m in modules if _varies(m)]
        if varying:
            others = f" and {len(varying) - 1} others" if len(varying) > 1 else ""
            warnings.warn(
                f"the model is in training mode, where {varying[0]}{others} depend on the batch or "
                "on chance; fold, compare and export it after model.eval().",
                UserWarning,
                stacklevel=stacklevel,
            )

    def call_own(self, site: Site, name: str) -> Any:
        """Call a module's own method, and put the module that it returns in its places."""
        made = call_own(site.path, kind_of(site.layer), site.layer, name)
        if not isinstance(made, nn.Module) or made is site.layer:
            return site.layer
        for path in site.paths:
            parent, _, child = path.rpartition(".")
            if child:
                setattr(self.model.get_submodule(parent), child, made)
            else:
                self.model = made
        return made

    def parts(self) -> list[branches.ModulePart]:
        """Return the modules whose own code can be traced."""
        return branches.parts(self.model)

    def takes_norm(self, layer: Any) -> bool:
        """Return whether a batch norm behind a layer can become a part of it."""
        return is_convolution(layer) or isinstance(layer, nn.Linear)

    def passes_on(self, layer: Any) -> bool:
        """Return whether a layer is an identity, without hooks."""
        return type(layer) is nn.Identity and not is_hooked(layer)

    def flow(self) -> Flow:
        """Return who follows whom, by symbolic tracing."""
        self._flow, self._owners = graph.flow(self.model), owners(self.model)
        return self._flow

    def pair_obstacle(self, conv: nn.Module, norm: nn.Module) -> str | None:
        """Return why this layer and the batch norm behind it cannot be fused."""
        reason = batchnorm.pair_obstacle(conv, norm, self._seen, self._owners)
        linear = isinstance(conv, nn.Linear)
        other_axis = conv in self._seen.deep or isinstance(norm, (nn.BatchNorm2d, nn.BatchNorm3d))
        return batchnorm.LINEAR_AXIS if reason is None and linear and other_axis else reason

    def fuse_ahead(self, norm: nn.Module, conv: nn.Module) -> str | None:
        """Fuse a batch norm into the convolution behind it; or return why not."""
        reason = batchnorm.pair_obstacle(conv, norm, self._seen, self._owners, ahead=True)
        return reason or batchnorm.fuse_ahead(norm, conv)


def _check_no_entries(site: Site) -> None:
    """Raise NotFoldable for what has a layer's parameters, but is a place in a graph."""
    if not type(site.layer).__module__.startswith("torch."):
        return
    for kind, layers in LAYER_KINDS.items():
        names = layers.kind.names if isinstance(layers.kind, ComposedKind) else ()
        there = [name for name in names if site.layer._parameters.get(name) is not None]
        if len(there) > 1:
            raise NotFoldable(
                f"{place(site.path)} has the parameters {' and '.join(there)} of a layer of kind "
                f"{kind!r} that became a part of a traced or exported graph; fold the model first, "
                "and trace or export it afterwards."
            )


def _varies(module: nn.Module) -> bool:
    """Return whether a module in training mode depends on the batch or on chance."""
    if not getattr(module, "training", False):  # which a frozen script lacks
        return False
    rates = (getattr(module, name, 0) for name in ("p", "dropout", "drop_prob"))
    return isinstance(module, (_BatchNorm, nn.RReLU)) or any(
        isinstance(rate, float) and rate > 0 for rate in rates
    )
