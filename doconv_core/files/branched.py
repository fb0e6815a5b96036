"""Blocks of branches in training checkpoints of others, and the convolution that each adds up to.

RepVGG, MobileOne, FastViT and others train a block as a sum of convolutions, each with a batch
norm, and of its own input; in inference it is one convolution, which deployed networks have. A
family of blocks is a row of `FAMILIES`; its blocks are told by the names of their branches.
Sources: RepVGG, arXiv 2101.03697; MobileOne, 2206.04040; RepLKNet, 2203.06717; FastViT, 2303.14189;
RepGhost, 2211.06088; GhostNetV3, 2404.11202; the names are their implementations' and timm's.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial, reduce
from typing import NamedTuple

import numpy as np

from doconv_core.files.blocks import (
    BRANCHES,
    NORM,
    Block,
    KernelOf,
    Read,
    below,
    problems,
)
from doconv_core.files.entries import Array, Entry
from doconv_core.files.layers import BATCH_NORM, CONVOLUTION, OTHER, Layer, Shape
from doconv_core.files.normed import NO_FORMS, find_normed
from doconv_core.maths.geometry import Geometry
from doconv_core.maths.linear import UNIT, Piece, Scale, Taps, centred, normalizing, plus, then
from doconv_core.state.layers import LayerForm


class Family(NamedTuple):
    """Blocks whose branches have these names; each is the path of a module below the block's.

    kernels: the branches with a convolution and its norm; `*` stands for numbers from 0 on, a `?`
    behind for what need not be there. norm: that of the input, of which there is none where the
    numbers of channels or the stride differ. folded: the convolution of the deployed network.
    marks: names of which all must be there, where others have some of a block's too. parts: what
    the convolution and its norm are called in a branch. subtracted: a norm of the input that is
    taken away. scale: what all these are multiplied with, one number a channel. plain: whether the
    input itself is added at last. beside: a family without which in the same model it is none.
    """

    name: str
    kernels: tuple[str, ...]
    norm: str
    folded: str
    marks: tuple[str, ...] = ()
    parts: tuple[str, str] = ("conv", "bn")
    subtracted: str = ""
    scale: str = ""
    plain: bool = False
    beside: str = ""


FAMILIES = (
    Family("RepMixer", ("mixer.conv_kxk.*", "mixer.conv_scale?"), "mixer.identity", "reparam_conv",
           ("mixer.conv_kxk.*", "norm.identity"), subtracted="norm.identity", scale="layer_scale",
           plain=True),
    Family("RepMixer", ("mixer.rbr_conv.*", "mixer.rbr_scale?"), "mixer.rbr_skip", "reparam_conv",
           ("mixer.rbr_conv.*", "norm.rbr_skip"), subtracted="norm.rbr_skip", scale="layer_scale",
           plain=True),
    Family("RepVGG", ("rbr_dense", "rbr_1x1"), "rbr_identity", "rbr_reparam"),
    Family("RepVGG", ("conv_kxk", "conv_1x1"), "identity", "reparam_conv",
           ("conv_kxk.conv", "conv_1x1.conv")),
    Family("MobileOne", ("rbr_conv.*", "rbr_scale?"), "rbr_skip", "reparam_conv"),
    Family("MobileOne", ("conv_kxk.*", "conv_scale?"), "identity", "reparam_conv",
           ("conv_kxk.*",)),
    Family("large kernel", ("large_conv", "small_conv"), "", "reparam_conv",
           ("large_conv.conv", "small_conv.conv")),
    Family("large kernel", ("lkb_origin", "small_conv?"), "", "lkb_reparam", ("lkb_origin",)),
    *(Family("position encoding", (name,), "", "reparam_conv", parts=("", ""), plain=True,
             beside="RepMixer") for name in ("pos_enc", "pe")),
    Family("LCNetV2", ("dw_conv_list.*",), "", "dw_conv"),
    *(Family("GhostNetV3", (f"{name}_rpr_conv.*", f"{name}_rpr_scale?"), f"{name}_rpr_skip",
             folded, (f"{name}_rpr_conv.*.{norm}",), ("conv", norm))
      for name, folded in (("primary", "primary_conv.0"), ("cheap", "cheap_operation.0"),
                           ("dw", "conv_dw"))
      for norm in ("bn", "bn1")),
    Family("RepGhost", ("cheap_operation",), "fusion_bn.0", "cheap_operation", ("fusion_bn.0",),
           parts=("0", "1")),
)  # fmt: skip


class Branch(NamedTuple):
    """A term of a block: a convolution, or the input where there is none, and its norm, if any."""

    conv: Layer | None
    norm: Layer | None
    sign: int = 1


@dataclass(frozen=True)
class FamilyBlock(Block):
    """A block of one of the families. branches: what is added up.

    scale: the entry that they are multiplied with, "" for none. plain: whether the input is added.
    """

    branches: tuple[Branch, ...] = field(default=(), kw_only=True)
    scale: str = field(default="", kw_only=True)
    plain: bool = field(default=False, kw_only=True)

    def added_up(self, read: Read, kernel_of: KernelOf) -> tuple[Array, Array]:
        """Return the kernel and the bias of the convolution that it adds up to, in float64."""
        assert self.kernel_shape is not None  # as of one that can be folded
        outputs, channels, *size = self.kernel_shape
        ones, none = (1,) * len(size), ((0, 0),) * len(size)
        channels = max(channels, 1)
        groups = 1 if outputs % channels else outputs // channels  # if there are as many inputs

        def piece(branch: Branch) -> Piece:
            conv, norm, sign = branch
            made: Piece = UNIT
            if conv is not None:
                bias = conv.entries.get("bias")
                shift = None if bias is None else read(bias).astype(np.float64).reshape(-1)
                made = centred(Taps(kernel_of(conv), shift, Geometry(ones, ones, none), groups))
            if norm is not None:
                values = {key: read(norm.entries[role]).reshape(-1) for key, role in NORM.items()}
                made = then(made, normalizing(outputs, epsilon=self.epsilon_of(norm), **values))
            return then(made, Scale(UNIT.factor * sign))

        whole = reduce(plus, map(piece, self.branches))
        if self.scale:
            whole = then(whole, Scale(read(self.scale).astype(np.float64).reshape(-1)))
        whole = plus(whole, UNIT) if self.plain else whole
        assert isinstance(whole, Taps)  # as the first branch is
        assert whole.bias is not None  # as `sources` has one
        return whole.kernel, whole.bias


def with_blocks(
    layers: Sequence[Layer],
    entries: Mapping[str, Entry],
    families: Sequence[Family] = FAMILIES,
    forms: Mapping[str, LayerForm] = NO_FORMS,
) -> tuple[Layer, ...]:
    """Return layers, in their order, with those of each block as one, a `Block`.

    families: of others' blocks; this package's layers of branches are blocks in any case. forms:
    what a state tells of its layers.
    """
    blocks, known = find_normed(layers, entries, forms), set[tuple[str, str]]()
    taken = {id(layer) for block in blocks for layer in block.layers}
    left = [layer for layer in layers if id(layer) not in taken]
    for family in families:
        found: dict[tuple[str, str], dict[str, Layer]] = {}
        taken = set()
        for layer in left:
            at = _place(family, layer)
            if at is not None:
                found.setdefault((layer.part, at[0]), {})[at[1]] = layer
        for (part, path), own in found.items():
            is_told = not family.beside or (part, family.beside) in known
            if is_told and all(_under(mark, own) for mark in family.marks):
                blocks.append(_block(family, part, path, own, entries))
                known.add((part, family.name))
                taken |= set(map(id, own.values()))
        left = [layer for layer in left if id(layer) not in taken]
    place = {id(layer): number for number, layer in enumerate(layers)}
    first = {id(block): id(block.layers[0]) for block in blocks}
    return tuple(sorted([*left, *blocks], key=lambda x: place[first.get(id(x), id(x))]))


def _place(family: Family, layer: Layer) -> tuple[str, str] | None:
    """Return the path of the block that a layer may be of, and its own below that."""
    if [*layer.entries] == [family.scale]:  # a parameter of the block itself
        return layer.path, family.scale
    match = _pattern(family).fullmatch(layer.path)
    return None if match is None else (match["block"] or "", match["own"])


@cache
def _pattern(family: Family) -> re.Pattern[str]:
    names = (*family.kernels, family.norm, family.subtracted, family.scale)
    branches = "|".join(_regex(name) for name in names if name)
    return re.compile(rf"(?:(?P<block>.+)\.)?(?P<own>(?:{branches})(?:\..+)?)", re.DOTALL)


def _regex(name: str) -> str:
    return re.escape(name.rstrip("?")).replace(r"\*", "[0-9]+")


def _under(name: str, own: Mapping[str, Layer]) -> set[str]:
    """Return the names of the branches, or of what is in them, that are so called."""
    matches = (re.match(rf"{_regex(name)}(?=\.|\Z)", path) for path in own if name)
    return {match[0] for match in matches if match}


def _block(
    family: Family, part: str, path: str, own: Mapping[str, Layer], entries: Mapping[str, Entry]
) -> FamilyBlock:
    """Return the block of these layers, by their paths in it; with a note where they make none."""
    block = FamilyBlock(
        path, BRANCHES, below(own), part=part, family=family.name, layers=(*own.values(),),
        becomes=family.folded, plain=family.plain,
    )  # fmt: skip
    paths = _branches(family, own)
    shape = _shape([own[conv] for conv, _, _ in paths if conv in own])
    kinds = {conv: CONVOLUTION for conv, _, _ in paths if conv}
    kinds |= {norm: BATCH_NORM for _, norm, _ in paths if norm}
    kinds |= {family.scale: OTHER} if family.scale in own else {}
    found = problems(kinds, own, lambda _: shape[0], partial(_misfits, shape), entries)
    problem = next(found, None)
    if problem is None and (family.plain or any(not conv for conv, _, _ in paths)):
        problem = _unlike_input(shape)
    if problem is not None:
        return dataclasses.replace(block, note=f"named like a {family.name} block, but {problem}")
    branches = [Branch(own.get(conv), own.get(norm), sign) for conv, norm, sign in paths]
    conv, norm, _ = branches[0]
    assert conv is not None  # as every family has a branch with one
    sources = conv.entries["weight"], (norm or conv).entries["bias"]
    before = sources[0][: sources[0].rfind(f"{paths[0][0].partition('.')[0]}.")]
    return dataclasses.replace(
        block, branches=tuple(branches), count=len(branches), sources=sources, kernel_shape=shape,
        folded=tuple(f"{before}{family.folded}.{role}" for role in ("weight", "bias")),
        scale="".join(own[family.scale].entries.values()) if family.scale in own else "",
    )  # fmt: skip


def _branches(family: Family, own: Mapping[str, Layer]) -> list[tuple[str, str, int]]:
    """Return the paths of the convolution and the norm of each branch, and its sign; "" for none.

    Those that have to be there are among them, there or not.
    """
    found = []
    for name in family.kernels:
        there = _under(name, own)
        if there or not name.endswith("?"):
            numbers = range(max(len(there), 1)) if "*" in name else range(1)
            for branch in (name.rstrip("?").replace("*", str(n)) for n in numbers):
                conv, norm = family.parts
                found.append((f"{branch}.{conv}".rstrip("."), norm and f"{branch}.{norm}", 1))
    if _under(family.norm, own):
        found.append(("", family.norm, 1))
    if family.subtracted:
        found.append(("", family.subtracted, -1))
    return found


def _shape(convs: Sequence[Layer]) -> Shape:
    """Return the shape of the sum of kernels: of the first, and as large as the largest."""
    shapes = [conv.kernel_shape for conv in convs if conv.kernel_shape]
    if not shapes or len({len(shape) for shape in shapes}) > 1:
        return ()
    return (*shapes[0][:2], *(max(sizes) for sizes in list(zip(*shapes, strict=True))[2:]))


def _misfits(shape: Shape, at: str, layer: Layer) -> Iterator[str]:
    """Yield why the kernel of a convolution is none of a block's whose sum has this shape."""
    own = layer.kernel_shape or ()
    if own[:2] != shape[:2]:
        yield f"the kernel {own} of {at} does not fit the others"
    elif any(n > whole or (whole - n) % 2 for n, whole in zip(own, shape, strict=True)):
        fit = f"a kernel of {own[2:]} taps has no place in the middle of one of {shape[2:]}"
        yield f"of {at}, {fit}"


def _unlike_input(shape: Shape) -> str | None:
    """Return why the input cannot be one of the branches; None where it can."""
    outputs, channels, *size = shape
    if channels and outputs % channels == 0 and all(n % 2 for n in size):
        return None
    reason = f"no kernel of shape {shape} gives each channel of its input back"
    return f"its input is added, and {reason}"
