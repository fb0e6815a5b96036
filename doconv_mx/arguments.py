"""Layers that take an ordinary layer's arguments, in its order, and some of their own."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from mxnet.gluon import ParameterDict

from doconv_core.maths.spec import as_integer, as_tuple
from doconv_core.models.received import named_constructor

_LAYOUTS = {1: ("NCW",), 2: ("NCHW", "NHWC"), 3: ("NCDHW", "NDHWC")}


class StandIn:
    """What stands in for an ordinary layer. Each rank names that: ordinary, rank.

    `own_arguments` gives its own arguments, with their defaults; `_make` takes all of them.
    """

    ordinary: type[Any]
    rank: int

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "ordinary" in vars(cls):
            cls.__signature__ = _signature(cls)  # type: ignore[attr-defined]
            if "__init__" not in vars(cls):
                cls.__init__ = named_constructor(cls)  # type: ignore[method-assign]
        elif "__init__" in vars(cls):
            cls.__signature__ = None  # type: ignore[attr-defined]  # its own, and not an inherited

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int | tuple[int, ...],
        strides: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        layout: str | None = None,
        activation: str | None = None,
        use_bias: bool = True,
        weight_initializer: Any = None,
        bias_initializer: Any = "zeros",
        prefix: str | None = None,
        params: ParameterDict | None = None,
        **own: Any,
    ) -> None:
        rank, defaults = self.rank, self.own_arguments()
        for name in own.keys() - defaults.keys():
            raise TypeError(
                f"{type(self).__name__} takes {', '.join(defaults) or 'nothing'} beside "
                f"{self.ordinary.__name__}'s arguments; received {name}={own[name]!r}."
            )
        given = SimpleNamespace(
            in_channels=as_integer("in_channels", in_channels, least=0),
            channels=as_integer("channels", channels),
            kernel_size=as_tuple("kernel_size", kernel_size, rank),
            strides=as_tuple("strides", strides, rank),
            padding=as_tuple("padding", padding, rank, least=0),
            dilation=as_tuple("dilation", dilation, rank),
            groups=as_integer("groups", groups),
            layout=_as_layout(layout, rank),
            activation=activation,
            use_bias=use_bias,
            weight_initializer=weight_initializer,
            bias_initializer=bias_initializer,
            scope={"prefix": prefix, "params": params},
        )
        self._make(given, {**defaults, **own})

    @classmethod
    def own_arguments(cls) -> dict[str, Any]:
        """Return the arguments that the ordinary layer lacks, with their defaults."""
        return {}

    @property
    def spec(self: Any) -> Any:
        """The layer's sizes. Raises ValueError while `in_channels` has not been inferred yet."""
        in_channels = self.inferred_in_channels()
        if not in_channels:
            raise ValueError(
                f"in_channels of layer {self.name!r} is not known yet; pass it, or run the layer "
                "once."
            )
        return replace(self._outline, in_channels=in_channels)

    def _make(self, given: SimpleNamespace, own: dict[str, Any]) -> None:
        """Create the layer. given: the ordinary layer's arguments, validated. own: the own ones."""
        raise NotImplementedError


def _as_layout(layout: str | None, rank: int) -> str:
    """Return the layout of a layer of `rank` spatial dimensions, channels-first where not given."""
    layout = _LAYOUTS[rank][0] if layout is None else layout
    if layout not in _LAYOUTS[rank]:
        raise ValueError(
            f"layout must be {' or '.join(map(repr, _LAYOUTS[rank]))}; received layout={layout!r}."
        )
    return layout


def _signature(cls: type[StandIn]) -> inspect.Signature:
    """Return the signature of a class, which tells of its own arguments by their names."""
    _, *usual, _ = inspect.signature(StandIn.__init__).parameters.values()
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = cls.own_arguments().items()
    parameters = [inspect.Parameter(name, keyword, default=default) for name, default in own]
    return inspect.Signature([*usual, *parameters])
