"""`doconv cost`: parameters and operations of a layer, a file or a network by its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import click

from doconv_core.cli.command import (
    counted,
    opened,
    print_json,
    size,
)
from doconv_core.cli.cost_file import cost_file, forms_object, print_forms
from doconv_core.cli.cost_network import cost_network
from doconv_core.cli.options import (
    KernelSizes,
    NumbersType,
    Place,
    SizeType,
    allow_option,
    force_option,
    json_option,
    kernel_size_option,
    parse_size,
    places_type,
    target_argument,
)
from doconv_core.kinds.do_conv import layer_cost
from doconv_core.maths.spec import ConvSpec

GRAMMAR = "IN,OUT,KERNEL[,groups=N][,S=N][,stride=SIZE][,dilation=SIZE][,padding=SIZE][,bias=no]"
_LAYER = re.compile(r"\s*\d+\s*,\s*\d+\s*,\s*\d+(x\d+)*\s*(,.*)?", re.IGNORECASE)
_SIZES = ("stride", "dilation", "padding")

# What networks of some families take; see `describe`.
OPTIONS = {
    "stages": (NumbersType(), "N-N-…", "Layers of each stage of a densenet."),
    "growth": (NumbersType(), "N-N-…", "Channels that each of them adds."),
    "bottleneck": (click.INT, "N", "How many times that the convolution before it has."),
    "group_3x3": (click.INT, "N", "Groups of a densenet's 3x3 convolutions."),
    "heads": (click.INT, "N", "Heads of a dynamic group convolution."),
    "squeeze_rate": (click.INT, "N", "Channels that a head squeezes into one feature."),
    "gate_factor": (click.FLOAT, "SHARE", "The share of the channels that a head keeps."),
}


def network_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with an option for each of `OPTIONS`."""
    for name, (kind, metavar, text) in reversed(OPTIONS.items()):
        flag = f"--{name.replace('_', '-')}"
        command = click.option(flag, name, type=kind, metavar=metavar, help=text)(command)
    return command


@click.command(
    short_help="Count parameters and multiply-accumulates.",
    help=f"""Count what a layer, a file or a network costs: ordinary, in training, and folded.

    A LAYER is {GRAMMAR}, with S as the depth multiplier. Its padding is `same` unless given, which
    keeps the input's size at stride 1. --input is the size of its input.

    A FILE tells no strides, so --at tells where its layers work: the size of their output, or /N
    for the Nth part of --input. Of convolutions that no --at matches, the cost of one output
    position is shown; linear layers work at one position.

    A NETWORK is a name such as resnet50_v1b or cifar_resnet20_bsconvu, with _doconv behind it for
    over-parameterized layers. --input and --classes are those of the data set it is for unless
    given. Its operations are counted as in BSConv's tables: multiply-accumulates, biases, two for
    each input of a batch norm, and one for each output of a ReLU and each input of a pooling.
    Networks of dynamic group convolutions have theirs, too, by the rule of DGC's tables, and what
    is really run where the channels that a head drops are skipped; their sizes are options.

    A multiply-accumulate is one multiplication with its addition; biases and what is no convolution
    or linear layer count none. The kernel is composed once for the whole batch.

    \b
    Examples:
      doconv cost 64,64,3x3 --input 56x56 --batch 32
      doconv cost 256,256,3x3,groups=256,S=12,stride=2 --input 28x28
      doconv cost model.pt
      doconv cost model.pt --input 224x224 --at 'conv1=/2' --at 'layer1.*=/4'
      doconv cost cifar_resnet20_bsconvu --input 3x32x32 --classes 100 --plot cost.png
      doconv cost resnet18_v1b --kind orepa --input 224x224
      doconv cost cifar_dydensenet86 --stages 14-14-14 --growth 8-16-32 --gate-factor 0.25
    """,
)
@click.argument("subject", metavar="LAYER|FILE|NETWORK")
@click.option(
    "--input", "input_size", metavar="SIZE", type=SizeType(),
    help="Size of the input, such as 224x224.",
)  # fmt: skip
@click.option(
    "--at", "places", multiple=True, metavar="[GLOB=]SIZE|/N", type=places_type,
    help="Size of the output of the layers of a FILE that GLOB matches. May be repeated; the last "
    "that matches counts.",
)  # fmt: skip
@click.option(
    "--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Number of images."
)
@click.option(
    "--classes", type=click.IntRange(min=1), help="Number of classes of a NETWORK's output."
)
@click.option(
    "--plot", type=target_argument, metavar="OUT",
    help="Draw the cost of each layer of a NETWORK to OUT, such as cost.png or cost.svg.",
)  # fmt: skip
@click.option(
    "--kind",
    metavar="KIND",
    help="Of layers in the places of a NETWORK's convolutions: doconv, branches, orepa, repvgg, …",
)
@network_options
@force_option
@kernel_size_option
@allow_option
@json_option
def cost(
    subject: str,
    input_size: tuple[int, ...] | None,
    places: Sequence[tuple[str, Place]],
    batch: int,
    classes: int | None,
    plot: Path | None,
    kind: str | None,
    force: bool,
    kernel_sizes: KernelSizes,
    allow: Sequence[str],
    as_json: bool,
    **options: Any,
) -> None:
    """As the help text above has it."""
    file = Path(subject)
    if not is_layer_text(subject) and (file.is_dir() or not file.exists()):
        if places or kernel_sizes or allow:
            raise click.UsageError(
                f"{subject!r} is no file, as --at, --kernel-size and --allow need one."
            )
        given = {name: value for name, value in options.items() if value is not None}
        given |= {"kind": kind} if kind is not None else {}
        cost_network(subject, input_size, classes, batch, plot, force, as_json, given)
        return
    if any(value is not None for value in (classes, plot, kind)) or force:
        raise click.UsageError(
            "--classes, --plot, --kind and --force are for networks, given by name."
        )
    for name, value in options.items():
        if value is not None:
            flag = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{flag} is for networks, given by name.")
    if is_layer_text(subject):
        if places or kernel_sizes or allow:
            raise click.UsageError(
                "--at, --kernel-size and --allow are for files; a LAYER says it all."
            )
        _layer(subject, input_size, batch, as_json)
        return
    if input_size is not None and not any(place.divisor for _, place in places):
        raise click.UsageError(
            "a file does not tell at which positions its layers work; with --input, give such as "
            "--at 'layer1.*=/4', or --at /1 where all keep its size."
        )
    with opened(Path(subject), kernel_sizes, allow) as checkpoint:
        cost_file(checkpoint, places, input_size, batch, as_json)


def _layer(subject: str, input_size: tuple[int, ...] | None, batch: int, as_json: bool) -> None:
    try:
        layer = parse_layer(subject)
        if input_size is None:
            raise ValueError("give the size of its input, such as --input 56x56.")
        output = layer.output_size(_spatial(input_size, layer))
    except (TypeError, ValueError) as error:
        raise click.UsageError(f"{subject}: {error}") from None
    found = layer_cost(layer.spec, prod(output), batch=batch, bias=layer.bias)
    if as_json:
        spec = layer.spec
        names = ("in_channels", "out_channels", "kernel_size", "groups", "depth_multiplier")
        sizes = {name: getattr(spec, name) for name in names}
        print_json(
            {
                "layer": {**sizes, "bias": layer.bias},
                "batch": batch,
                "output": output,
                "cost": forms_object(found),
            }
        )
        return
    click.echo(f"{counted(batch, 'image')} of {size(input_size)}, output {size(output)}")
    print_forms(found)


def _spatial(input_size: tuple[int, ...], layer: LayerText) -> tuple[int, ...]:
    """Return the input size without its channels, which may stand before it."""
    if len(input_size) != layer.spec.rank + 1:
        return input_size
    if input_size[0] != layer.spec.in_channels:
        *sizes, last = input_size
        first = f": write {size([last, *sizes])}" if last == layer.spec.in_channels else ""
        raise ValueError(
            f"the layer has {layer.spec.in_channels} input channels, which stand first; received "
            f"the input size {size(input_size)}{first}."
        )
    return input_size[1:]


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
