"""The activation functions of MobileNets, which Gluon lacks."""

from __future__ import annotations

from typing import Any

from mxnet.gluon import HybridBlock


class _Activation(HybridBlock):
    def __repr__(self) -> str:
        return type(self).__name__


class ReLU6(_Activation):
    """`min(max(x, 0), 6)`, element by element; the gradient at 0 is 0, as of other frameworks."""

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        """Return the activation, of the shape of `x`."""
        return F.clip(F.relu(x), 0, 6)


class HardSigmoid(_Activation):
    """`min(max(x + 3, 0), 6) / 6`, element by element."""

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        """Return the activation, of the shape of `x`."""
        return F.clip(x + 3, 0, 6) / 6


class HardSwish(_Activation):
    """`x · min(max(x + 3, 0), 6) / 6`, element by element."""

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        """Return the activation, of the shape of `x`."""
        return x * (F.clip(x + 3, 0, 6) / 6)
