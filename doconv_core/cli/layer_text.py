"""A convolution written as text, such as `64,64,3x3,stride=2`, and the size of its output."""

from __future__ import annotations

import re
from dataclasses import dataclass

from doconv_core.cli.parse import parse_size
from doconv_core.maths.spec import ConvSpec

GRAMMAR = "IN,OUT,KERNEL[,groups=N][,S=N][,stride=SIZE][,dilation=SIZE][,padding=SIZE][,bias=no]"
_LAYER = re.compile(r"\s*\d+\s*,\s*\d+\s*,\s*\d+(x\d+)*\s*(,.*)?", re.IGNORECASE)
_SIZES = ("stride", "dilation", "padding")


@dataclass(frozen=True)
class LayerText:
    """A convolution layer as far as its cost is concerned.

    spec: its sizes. stride, dilation: one integer for each dimension. padding: the same, at either
    end, or None for as much as keeps the size at stride 1.
    """

    spec: ConvSpec
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...] | None
    bias: bool

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the size of the output for an input of this size; ValueError where it is empty."""
        if len(size) != self.spec.rank:
            raise ValueError(
                f"the input must have {self.spec.rank} sizes, as the kernel has; received "
                f"{len(size)}."
            )
        output = []
        for d, n in enumerate(size):
            if self.padding is None:
                output.append(-(-n // self.stride[d]))
                continue
            extent = self.dilation[d] * (self.spec.kernel_size[d] - 1) + 1
            output.append((n + 2 * self.padding[d] - extent) // self.stride[d] + 1)
        if min(output) < 1:
            raise ValueError(f"the input is too small for the kernel; received {size}.")
        return tuple(output)


def is_layer_text(text: str) -> bool:
    """Return whether `text` is meant as a layer, not as a file: it begins as one does."""
    return _LAYER.fullmatch(text) is not None


def parse_layer(text: str) -> LayerText:
    """Return the layer that `text` tells in GRAMMAR; ValueError says what is wrong with it."""
    inputs, outputs, kernel, *options = (part.strip() for part in text.split(","))
    kernel_size = parse_size(kernel)
    if kernel_size is None:
        raise ValueError(f"the kernel must be a size such as 3x3; received {kernel!r}.")
    values: dict[str, str] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in ("groups", "S", "bias", *_SIZES):
            raise ValueError(f"a layer is {GRAMMAR}; received {option!r}.")
        if name in values:
            raise ValueError(f"{name} is given twice.")
        values[name] = value
    rank = len(kernel_size)
    multiplier = _integer("S", values["S"]) if "S" in values else None
    spec = ConvSpec(
        int(inputs), int(outputs), kernel_size, _integer("groups", values.get("groups", "1")),
        multiplier,  # type: ignore[arg-type]  # None stands for M
    )  # fmt: skip
    if values.get("bias", "yes") not in ("yes", "no"):
        raise ValueError(f"bias must be yes or no; received {values['bias']!r}.")
    padding = values.get("padding", "same")
    return LayerText(
        spec=spec,
        stride=_per_dimension("stride", values.get("stride", "1"), rank),
        dilation=_per_dimension("dilation", values.get("dilation", "1"), rank),
        padding=None if padding == "same" else _per_dimension("padding", padding, rank, least=0),
        bias=values.get("bias", "yes") == "yes",
    )


def _integer(name: str, text: str) -> int:
    found = parse_size(text)
    if found is None or len(found) > 1:
        raise ValueError(f"{name} must be a positive integer; received {text!r}.")
    return found[0]


def _per_dimension(name: str, text: str, rank: int, least: int = 1) -> tuple[int, ...]:
    found = parse_size(text, least=least)
    if found is None or len(found) not in (1, rank):
        raise ValueError(f"{name} must be a number, or {rank} of them as 3x3; received {text!r}.")
    return found * rank if len(found) == 1 else found
