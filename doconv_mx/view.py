"""A Gluon model as the core's tools see it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mxnet import autograd
from mxnet.gluon import Block, HybridBlock, SymbolBlock, nn

from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.models.own_methods import call_own
from doconv_core.models.report import READ, SHARED, place, read_elsewhere
from doconv_core.models.view import Flow, ModelView, Site
from doconv_core.state.file import entry
from doconv_mx import batchnorm, graph, reads, symbols
from doconv_mx.composed import ComposedLayers
from doconv_mx.kinds import LAYER_KINDS
from doconv_mx.ordinary import is_convolution, obstacle, outline
from doconv_mx.private import (
    BatchNorm,
    Conv,
    has_values,
    hybridize_like,
    registered,
    settings,
)
from doconv_mx.surgery import copied, exchange, forget_graphs
from doconv_mx.tree import check_model, count, owners, parameters, places, uncounted, walk


class View(ModelView):
    """A block and all below it, with what is in the graphs of its `SymbolBlock`s.

    Of these the convolutions and batch norms are sites of their own. Raises TypeError for what is
    no block.
    """

    model: Block
    batch_norm, packages = BatchNorm, ("mxnet.", "doconv_mx.")
    is_convolution, outline = staticmethod(is_convolution), staticmethod(outline)
    fuse = staticmethod(batchnorm.fuse)

    def __init__(self, model: Block) -> None:
        check_model(model)
        self.model = model
        self._owners: dict[int, list[Block]] | None = None
        self._read: set[int] | None = None

    def sites(self) -> list[Site]:
        """Return every block once, a parent before its children, and nodes behind their block."""
        self._owners = self._read = None
        found = []
        for block, paths in places(self.model):
            found.append(Site(paths[0], paths, block))
            if isinstance(block, SymbolBlock):
                for node in (*symbols.nodes(block), *symbols.norms(block)):
                    at = tuple(entry(path, node.name) for path in paths)
                    found.append(Site(at[0], at, node.layer, block))
        return found

    def below(self, layer: Block) -> list[Block]:
        """Return the blocks inside a block."""
        return [block for _, block in walk(layer)][1:]

    def obstacle(self, layer: Any) -> str | None:
        """Return why a convolution cannot be replaced."""
        node = symbols.node_of(layer)
        return obstacle(layer) if node is None else node.reason

    def holders(self, layer: Any) -> list[Any]:
        """Return the layers that have the very weight; None for other uses and other layouts."""
        if self._owners is None:
            self._owners = owners(self.model)
        node = symbols.node_of(layer)
        if node is not None:  # which shares it with nothing that could be converted with it
            return [layer if b is node.block else None for b in self._owners[id(node.weight)]]
        return [
            block if _is_alike(block, layer) else None for block in self._owners[id(layer.weight)]
        ]

    def other_use(self, layer: Any) -> str | None:
        """Return whether a block's forward is seen to read a weight that is a convolution's."""
        node = symbols.node_of(layer)
        weight = layer.weight if node is None else node.weight
        own = layer.entries().values() if hasattr(layer, "entries") else [weight]
        return READ if self._are_read(own) else None

    def _are_read(self, parameters: Iterable[Any]) -> list[Any]:
        """Return those of these parameters that blocks are seen to read which they are not of."""
        if self._read is None:
            self._read = reads.read_elsewhere(self.model)
        return [parameter for parameter in parameters if id(parameter) in self._read]

    def count(self) -> int:
        """Return how many numbers the parameters have; those of unknown shape have none yet."""
        return count(self.model)

    def uncounted(self) -> int:
        """Return how many parameters have no known shape yet."""
        return uncounted(self.model)

    def copied(self, given_up: Sequence[Any] = ()) -> View:
        """Return the view of a copy; TypeError where the model cannot be copied."""
        return View(copied(self.model))

    def check_known(self, site: Site, forms: Mapping[str, str]) -> None:
        """Raise NotFoldable for a symbol that was made of a kind's layers."""
        if isinstance(site.layer, SymbolBlock) and not isinstance(
            site.layer, symbols.DOSymbolBlock
        ):
            for layers in LAYER_KINDS.values():
                if isinstance(layers, ComposedLayers):
                    names, operators = layers.kind.names[1:], layers.operators
                    symbols.refuse_composition(site.path, site.layer, names, operators)

    def finish(self, *, changed: bool) -> None:
        """Let every hybridized block build its graph anew."""
        forget_graphs(self.model)

    def call_own(self, site: Site, name: str) -> Any:
        """Call a block's own method, and put the block that it returns in its places."""
        old, kind = site.layer, self.name_of(site.layer)
        with autograd.pause():
            made = call_own(site.path, kind, old, name)
        forget_graphs(self.model)
        if not isinstance(made, Block) or made is old:
            return old
        returned = f"{place(site.path)}: {kind}.{name}() returned a {self.name_of(made)}"
        empty = [p.name for p in parameters(made) if not has_values(p)]
        if empty:
            raise NotFoldable(f"{returned} without values for {empty[0]!r}; it is to give them.")
        if isinstance(old, HybridBlock):
            if not isinstance(made, HybridBlock):
                raise NotFoldable(f"{returned}, which is no HybridBlock as the one before.")
            hybridize_like(made, old)
        if old is self.model:
            self.model = made
        else:
            exchange(self.model, old, made)
        return made

    def norm_obstacle(self, norm: Any) -> str | None:
        """Return why a batch norm cannot be fused, wherever it stands."""
        node = symbols.node_of(norm)
        if node is not None:
            return node.reason
        reason, own = batchnorm.norm_obstacle(norm), registered(norm)
        read = [name for name in own if self._are_read([own[name]])] if reason is None else []
        return read_elsewhere(read) if read else reason

    def takes_norm(self, layer: Any) -> bool:
        """Return whether a batch norm behind a layer can become a part of it."""
        return is_convolution(layer) or isinstance(layer, nn.Dense)

    def flow(self) -> Flow:
        """Return who follows whom, as far as it can be seen without data."""
        self._owners = owners(self.model)
        self._names = Counter(p.name for p in parameters(self.model))
        return graph.flow(self.model, self._owners, self._names)

    def pair_obstacle(self, conv: Any, norm: Any) -> str | None:
        """Return why this layer and this batch norm cannot be fused."""
        assert self._owners is not None  # as `flow` was asked before
        reason = batchnorm.pair_obstacle(conv, norm, self._owners, self._names)
        return reason or (SHARED if self._are_read(registered(conv).values()) else None)

    def fuse_ahead(self, norm: Any, conv: Any) -> str | None:
        """Fuse a batch norm into the convolution behind it; or return why not."""
        return self.pair_obstacle(conv, norm) or batchnorm.fuse_ahead(norm, conv)


def _is_alike(block: Block, layer: Any) -> bool:
    """Return whether a block has a layer's weight as a convolution of the same layout."""
    return (
        isinstance(block, Conv)
        and block.weight is layer.weight
        and settings(block)["layout"] == settings(layer)["layout"]
    )
