"""What the DO-Conv layers of Keras share, dense and depthwise: W and D, and how they compose."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from doconv_core.kinds.do_conv import DO_CONV
from doconv_core.maths.spec import ConvSpec
from doconv_tf.compose import as_weight, compose
from doconv_tf.composed import ComposedConv, Ordinary

# D's variable in every layer, of which `depthwise_kernel` would be a separable one's kernel.
D_NAME = "d_kernel"
# D's name in a store, where the ordinary variables have numbers, and the attribute by which
# TensorFlow's checkpoints find it: files that exist have it.
D_ENTRY = "depthwise_kernel"


class OverParameterized(ComposedConv[Ordinary]):
    """What the DO layers share, to stand before the ordinary layer.

    Variables: `_kernel`, W, in the ordinary kernel's shape where `S == M`; `depthwise_kernel`, D,
    `(I, M, S)`, zero at first, or None for a kernel of one tap; `bias`. d_name: the attribute that
    is D. The name of D's variable is `d_kernel` in every layer.
    """

    kind = DO_CONV
    spec: ConvSpec
    attributes = stored = MappingProxyType({"depthwise_weight": D_ENTRY})

    @property
    def d_name(self) -> str:
        """The name of D's attribute."""
        return self._attribute("depthwise_weight")

    @property
    def d_kernel(self) -> Any:
        """D, by the name that it has in every layer."""
        return getattr(self, self.d_name)

    def _variable_name(self, name: str) -> str:
        return D_NAME if name == "depthwise_weight" else super()._variable_name(name)

    def _entry(self, name: str, shape: tuple[int, ...] | None) -> Any:
        variable = super()._entry(name, shape)
        if variable is not None and variable.regularizer is None:
            variable.regularizer = self._kernel.regularizer
        return variable

    def compose(self, entries: Mapping[str, Any]) -> Any:
        """Return the kernel of W and D."""
        return compose(entries["weight"], entries["depthwise_weight"], self.spec)

    @classmethod
    def start(cls, kernel: Any, spec: ConvSpec) -> dict[str, Any]:
        """Return the W that a kernel becomes, and D of zeros where there is one."""
        return {**super().start(kernel, spec), "weight": as_weight(kernel, spec)}
