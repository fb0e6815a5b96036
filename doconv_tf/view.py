"""A Keras model as the core's tools see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.models.own_methods import call_own
from doconv_core.models.report import READ, place
from doconv_core.models.view import ModelView, Site
from doconv_tf import batchnorm, branches, graph
from doconv_tf.copying import copied
from doconv_tf.ordinary import (
    CONVOLUTIONS,
    below,
    count_parameters,
    first_occurrences,
    obstacle,
    require_built,
    spec_of,
)
from doconv_tf.orthonormal import is_marked, unmark
from doconv_tf.private import children, held_by, let_go, own_variables
from doconv_tf.saving import guard
from doconv_tf.surgery import become, check_functions, finish


class View(ModelView):
    """A layer and all below it. Raises TypeError for what is none, ValueError if it is not built.

    A path is made of the layers' names. A layer has one by each layer that holds it.
    """

    model: keras.Layer
    batch_norm = keras.layers.BatchNormalization
    packages = ("keras.", "doconv_tf.")
    obstacle, outline = staticmethod(obstacle), staticmethod(spec_of)
    norm_obstacle, fuse = staticmethod(batchnorm.norm_obstacle), staticmethod(batchnorm.fuse)
    takes_norm = staticmethod(batchnorm.takes_norm)

    def __init__(self, model: keras.Layer) -> None:
        require_built("", model)
        self.model = model
        self._seen = graph.Seen()
        self._holders: dict[int, list[Any]] | None = None
        self._read: set[int] | None = None

    def sites(self) -> list[Site]:
        """Return every layer once, each before those that it holds, in their order."""
        found = first_occurrences(self.model)
        paths: dict[int, list[str]] = {id(self.model): [""]}
        for path, layer in found:
            for child in children(layer):
                paths.setdefault(id(child), []).append(below(path, child))
        return [Site(path, tuple(paths[id(layer)]), layer) for path, layer in found]

    def below(self, layer: keras.Layer) -> list[Any]:
        """Return the layers inside a layer."""
        return [each for _, each in first_occurrences(layer)[1:]]

    def is_convolution(self, layer: keras.Layer) -> bool:
        """Return whether a layer is a convolution of any kind, recurrent ones too."""
        return isinstance(layer, CONVOLUTIONS)

    def holders(self, layer: keras.Layer) -> list[Any]:
        """Return the layers that have one of its variables as theirs."""
        if self._holders is None:
            self._holders = {}
            for _, each in first_occurrences(self.model):
                for variable in own_variables(each):
                    self._holders.setdefault(id(variable), []).append(each)
        return [each for v in own_variables(layer) for each in self._holders[id(v)]]

    def other_use(self, layer: keras.Layer) -> str | None:
        """Return whether an operation or a function is seen to hold one of a layer's variables."""
        if self._read is None:
            self._read = graph.variables_read(self.model)
        return None if self._read.isdisjoint(map(id, own_variables(layer))) else READ

    def count(self) -> int:
        """Return how many numbers the weights have, moving statistics included."""
        return count_parameters(self.model)

    def copied(self, given_up: Sequence[Any] = ()) -> View:
        """Return the view of a copy; TypeError where the model cannot be copied."""
        check_functions(self.model, inplace=False)
        return View(copied(self.model))

    def check_ready(self, site: Site) -> None:
        """Raise ValueError for a layer that is not built."""
        require_built(site.path, site.layer)

    def check_inplace(self) -> None:
        """Raise TypeError for functions that were compiled of the model."""
        check_functions(self.model, inplace=True)

    def finish(self, *, changed: bool) -> None:
        """Leave a changed model as one that was never compiled, and is stored only if it loads."""
        if changed:
            finish(self.model)
            guard(self.model)

    def settle(self) -> bool:
        """Take the orthonormality loss off; return whether there was any."""
        marked = [layer for _, layer in first_occurrences(self.model) if is_marked(layer)]
        for layer in marked:
            unmark(layer)
        return bool(marked)

    def call_own(self, site: Site, name: str) -> Any:
        """Call a layer's own method, and make the layer the one that it returns, in its place.

        What the method leaves without a name is no part of its layer any more: Keras would keep it.
        """
        held = [(each, held_by(each)) for _, each in first_occurrences(site.layer)]
        kind = self.name_of(site.layer)
        made = call_own(site.path, kind, site.layer, name)
        for each, before in held:
            let_go(each, before)
        if not isinstance(made, keras.Layer) or made is site.layer:
            return site.layer
        if not made.built:
            raise NotFoldable(
                f"{place(site.path)}: {kind}.{name}() returned a {self.name_of(made)} that is not "
                "built; it is to build it, too."
            )
        if site.layer is self.model:
            self.model = made
            return made
        made.name = site.layer.name  # by which it is found
        become(site.layer, made, frozenset(vars(site.layer)))
        return site.layer

    def parts(self) -> list[branches.GraphPart]:
        """Return the functional and sequential models in the model."""
        return branches.parts(self.model)

    def flow(self) -> graph.Seen:
        """Return who follows whom in the model's graphs."""
        self._seen = graph.Graph(self.model).flow()
        return self._seen

    def passes_on(self, layer: keras.Layer) -> bool:
        """Return whether a layer returns its input in inference, and nobody watches."""
        return batchnorm.passes_on(layer, self._seen)

    def fuse_ahead(self, norm: keras.Layer, conv: keras.Layer) -> str | None:
        """Fuse a batch norm into the convolution behind it; or return why not."""
        reason = batchnorm.pair_obstacle(conv, norm, self._seen, ahead=True)
        return reason or batchnorm.fuse_ahead(norm, conv)

    def pair_obstacle(self, conv: keras.Layer, norm: keras.Layer) -> str | None:
        """Return why this convolution and this batch norm cannot be fused."""
        return batchnorm.pair_obstacle(conv, norm, self._seen)
