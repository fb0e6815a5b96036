"""Layers that compose the kernel they convolve with, whatever their kind; and how models get them.

A kind's layers subclass `ComposedConv` and the ordinary layers that they stand in for. What they
add is the composition, in `keras.ops`, and the arguments that are theirs.

Keras keeps the axes of a kernel in the order `(*kernel_size, I/g, O)`, and those of a depthwise
kernel in the order `(*kernel_size, I, O/I)`. The weight has the ordinary kernel's shape where it
has its size; else its last canonical axis stands in the place of `*kernel_size`. Other entries are
canonical, as everywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import keras
import numpy as np
from keras import ops

from doconv_core.kinds.base import ComposedKind
from doconv_core.maths.batchnorm import NOT_FINITE, NotFoldable
from doconv_core.maths.layout import from_canonical
from doconv_core.maths.spec import ConvSpec, as_integer
from doconv_core.models import composed
from doconv_core.models.composed import PLAIN
from doconv_core.models.report import REPLACED, own_method
from doconv_core.models.view import Folding, ModelView, Site
from doconv_tf.arguments import StandIn
from doconv_tf.ordinary import check_ordinary, is_replaced, like, policy_of, put, spec_of
from doconv_tf.refused import Unquantized
from doconv_tf.surgery import become

if TYPE_CHECKING:
    from typing_extensions import Self  # of `typing` from Python 3.11 on

_ABOUT = ("initializer", "regularizer", "constraint")
_NAMES: Mapping[str, str] = MappingProxyType({})
# Why a constraint of the kernel cannot be kept: whatever it asks of one weight, such as a sign or a
# norm, the product with another need not have.
ONE_WEIGHT = (
    "would hold for one of the weights that the kernel is composed of, and not for the kernel"
)
# Regularizers that are as good for each of the weights, whatever its shape.
DECAYS = (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2)
EACH_WEIGHT = "would be given each of the weights that the kernel is composed of, not the kernel"


Ordinary = TypeVar("Ordinary", bound=keras.Layer)


class ComposedConv(StandIn, Unquantized, Generic[Ordinary]):
    """What the layers of every composed kind share, to stand before the ordinary layer.

    Its constructor takes the ordinary layer's arguments, and by keyword the kind's options, and
    what there is to say about its entries. `call` remains the ordinary layer's. Variables:
    `_kernel`, the kind's `weight`; its other entries, None where a layer of these sizes lacks one;
    `bias`. The entries are never cast on reading: `kernel` is cast, once, after the composition.

    kind: the core's. ordinary: the layer it stands in for. layout: the core's word for that layer's
    kernel. kernel_name: the attribute that is the composed kernel. By the kind's own names, where
    they are others here: option_names, of its options; attributes, of entries; stored, of entries
    in a store. prefixes: with what the names of the arguments for an entry's initializer,
    regularizer and constraint begin, where it has such.
    """

    kind: ComposedKind
    ordinary: type[Ordinary]
    layout = "*IO"
    kernel_name = "kernel"
    option_names = attributes = stored = _NAMES
    prefixes: Mapping[str, str] = MappingProxyType({"weight": "kernel"})

    def __init__(self, *args: Any, **options: Any) -> None:
        self._refuse_lora_arguments(options)
        given, own = self._taken(args, options)
        super().__init__(**given)
        self._refuse_quantized(self.dtype_policy)
        options = {name: own.pop(self._option(name)) for name in self.kind.options}
        spec = self._spec(self.groups if self.layout == "*IO" else 1, options)
        constraint = self._constraint_name()
        if getattr(self, constraint) is not None and self._is_composed(spec):
            raise ValueError(
                f"{type(self).__name__}: {constraint} {ONE_WEIGHT}. Leave it out, or use a "
                f"keras.layers.{self.ordinary.__name__}."
            )
        for name, value in self.kind.kept(options, spec).items():
            setattr(self, self._option(name), value)
        for name, value in own.items():
            setattr(self, name, _module_of(name).get(value))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Return the layer of a configuration; warn of a constraint that holds for W alone.

        Files have it from before it was refused.
        """
        name = cls._constraint_name()
        layer = super().from_config({**config, name: None})
        if config.get(name) is not None:
            constraint = keras.constraints.get(config[name])
            setattr(layer, name, constraint)
            if layer._is_composed(layer._spec(layer.groups if layer.layout == "*IO" else 1)):
                warnings.warn(
                    f"layer {layer.name!r}: its {name} holds for one of the weights that the "
                    "kernel is composed of, not for the kernel.",
                    stacklevel=2,
                )
        return layer

    @classmethod
    def _constraint_name(cls) -> str:
        """Return the name of the ordinary layer's argument that constrains its kernel."""
        return f"{cls.prefixes['weight']}_constraint"

    @classmethod
    def _is_composed(cls, spec: Any) -> bool:
        return len(cls.kind.entries(spec)) > 1

    @classmethod
    def own_arguments(cls) -> dict[str, Any]:
        """Return the kind's options, and for entries their initializer and what else there is."""
        own: dict[str, Any] = {cls._option(name): None for name in cls.kind.options}
        for entry, prefix in cls.prefixes.items():
            if entry != "weight":
                start = cls.kind.constants[entry]
                own |= {f"{prefix}_{about}": None for about in _ABOUT}
                own[f"{prefix}_initializer"] = (
                    keras.initializers.Constant(start) if start else "zeros"
                )
        return own

    @classmethod
    def _option(cls, name: str) -> str:
        return cls.option_names.get(name, name)

    @classmethod
    def _about(cls) -> list[str]:
        """Return the names of the arguments about entries."""
        options = [cls._option(name) for name in cls.kind.options]
        return [name for name in cls.own_arguments() if name not in options]

    def _spec(self, in_channels: Any, options: Mapping[str, Any] | None = None) -> Any:
        """Return the sizes for so many input channels. options: the kind's, if not the layer's."""
        if options is None:
            options = {name: getattr(self, self._option(name)) for name in self.kind.options}
        in_channels = as_integer("in_channels", in_channels)
        if self.layout == "*IO":
            conv = ConvSpec(in_channels, self.filters, self.kernel_size, self.groups)
        else:
            outputs = in_channels * self.depth_multiplier
            conv = ConvSpec(in_channels, outputs, self.kernel_size, in_channels)
        return self.kind.spec(conv, **options)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the weight, what the ordinary layer has beside it, and the other entries.

        input_shape: of the inputs, which includes the batch.
        """
        axis = -1 if self.data_format == "channels_last" else 1
        spec = self._spec(input_shape[axis])
        self._refuse_quantized(policy_of(self))
        self.compute_output_shape(input_shape)  # raises where nothing would be left
        channels = self.kind.conv(spec).in_channels
        self.input_spec = keras.InputSpec(min_ndim=self.rank + 2, axes={axis: channels})
        self.spec = spec
        shape = self._shape(self.kind.parameter_shape(spec))
        self._kernel = self._add(self.kernel_name, shape, self.prefixes["weight"], False)
        self._add_ordinary(self.kind.conv(spec))
        shapes = self.kind.entries(spec)
        for name in self.kind.names[1:]:
            setattr(self, self._attribute(name), self._entry(name, shapes.get(name)))

    def _entry(self, name: str, shape: tuple[int, ...] | None) -> Any:
        """Return a new variable for an entry beside the weight; None where there is no such."""
        variable, prefix = self._variable_name(name), self.prefixes.get(name)
        if shape is None:
            return None
        if prefix is not None:
            return self._add(variable, shape, prefix, False)
        start = keras.initializers.Constant(self.kind.constants[name])
        return self.add_weight(name=variable, shape=shape, initializer=start, autocast=False)

    def _add_ordinary(self, conv: ConvSpec) -> None:
        """Create what the ordinary layer has behind its kernel."""
        self.bias = self._add("bias", (conv.out_channels,), "bias", True) if self.use_bias else None

    def _add(self, name: str, shape: tuple[int, ...], prefix: str, autocast: bool) -> Any:
        options = {about: getattr(self, f"{prefix}_{about}") for about in _ABOUT}
        return self.add_weight(name=name, shape=shape, autocast=autocast, **options)

    @classmethod
    def _attribute(cls, name: str) -> str:
        return "_kernel" if name == "weight" else cls.attributes.get(name, name)

    def _variable_name(self, name: str) -> str:
        return self._attribute(name)

    def entries(self) -> dict[str, Any]:
        """Return the variables that the kernel is composed of, by the kind's names."""
        found = {name: getattr(self, self._attribute(name)) for name in self.kind.names}
        return {name: variable for name, variable in found.items() if variable is not None}

    @property
    def kernel(self) -> Any:
        """The composed kernel, as `composed_kernel()` gives it, in the layer's compute dtype."""
        if not self.built:
            raise AttributeError(f"layer {self.name!r} has no kernel before it is built.")
        return ops.cast(self.composed_kernel(), self.compute_dtype)

    @kernel.setter
    def kernel(self, value: Any) -> None:
        raise AttributeError(self._advice("has no kernel that could be set"))

    def composed_kernel(self) -> Any:
        """Return the kernel that the layer convolves with, in Keras' layout.

        It is composed in the variables' dtype, with mixed precision too, and differentiable. From
        variables of half precision it is composed in float32 and rounded once. A kernel of one tap
        is W itself. Raises ValueError if the layer is not built.
        """
        self._require_built()
        entries = self.entries()
        if len(entries) == 1:
            return ops.convert_to_tensor(entries["weight"])
        return ops.reshape(self.compose(entries), self._shape(self._kernel_shape()))

    def compose(self, entries: Mapping[str, Any]) -> Any:
        """Return the kernel of the entries, in Keras' order of axes. To be given by each kind."""
        raise NotImplementedError

    @classmethod
    def start(cls, kernel: Any, spec: Any) -> dict[str, Any]:
        """Return the entries of a layer that takes the place of one with this kernel."""
        shapes = cls.kind.entries(spec)
        constants = {
            name: ops.full(shapes[name], value, dtype=keras.backend.standardize_dtype(kernel.dtype))
            for name, value in cls.kind.constants.items()
            if name in shapes
        }
        return {"weight": kernel, **constants}

    def fold(self) -> Ordinary:
        """Return a new ordinary layer, built, with the same function.

        It keeps name, dtype policy and configuration. Its kernel is trainable where one of what it
        is composed of is. An activation that is a layer with weights is cloned. Raises ValueError
        if the layer is not built, NotFoldable for a subclass that computes something else, and for
        a kernel that is not finite.
        """
        self.check_foldable()
        composed = self.composed_kernel()
        if len(self.entries()) > 1 and not bool(ops.all(ops.isfinite(composed))):
            raise NotFoldable(NOT_FINITE)
        layer: Ordinary = like(self, self.ordinary)
        kernel = getattr(layer, self.kernel_name)
        put(kernel, composed)
        kernel.trainable = any(variable.trainable for variable in self.entries().values())
        return layer

    def check_foldable(self) -> None:
        """Raise what `fold` would raise."""
        cls = type(self)
        plain = {name: getattr(self.ordinary, name, None) for name in ("call", "convolution_op")}
        for name, method in {**plain, self.kernel_name: ComposedConv.kernel}.items():
            if getattr(cls, name, None) is not method:
                raise NotFoldable(own_method(cls, name, PLAIN))
        self._require_built()

    @classmethod
    def from_conv(cls, conv: Ordinary, **options: Any) -> Self:
        """Return a new layer, built, with the function of a trained ordinary layer.

        conv: an `ordinary` layer of Keras' own, exactly, and built; its variables are copied, and
        those of an activation that is a layer. Name, dtype policy and configuration are kept.
        options: the kind's, by their names here.
        Raises TypeError for any other layer: a subclass, or one with LoRA, may compute something
        else. Raises ValueError if it is not built.
        """
        check_ordinary(cls, conv)
        layer: Self = like(conv, cls, options)
        kernel = getattr(conv, cls.kernel_name)
        started, entries = cls.start(kernel, layer.spec), layer.entries()
        for name, variable in entries.items():
            put(variable, started[name])
            variable.trainable = kernel.trainable
        return layer

    def own_names(self) -> frozenset[str]:
        """Return the names of the attributes that this layer or the ordinary one has alone."""
        attributes = map(self._attribute, self.kind.names)
        return frozenset({"spec", self.kernel_name, *attributes, *self.own_arguments()})

    def get_config(self) -> dict[str, Any]:
        """Return the ordinary layer's configuration, and what the kind adds."""
        options = map(self._option, self.kind.options)
        about = {name: _module_of(name).serialize(getattr(self, name)) for name in self._about()}
        own = {name: getattr(self, name) for name in options}
        return {**super().get_config(), **own, **about}

    def save_own_variables(self, store: Any) -> None:
        """Store the weight as "0", the rest as the ordinary layer does, other entries by name."""
        if self.built:
            for name, variable in self._stored_variables().items():
                store[name] = variable

    def load_own_variables(self, store: Any) -> None:
        """Load what this layer stored, or what the ordinary layer did, which is taken over.

        Raises ValueError for an entry that is missing, unknown or of another shape; nothing is
        assigned then.
        """
        values = {name: store[name] for name in store.keys()}  # noqa: SIM118
        if not self.built and not values:
            return
        self._require_built()
        variables = self._stored_variables()
        others = {self.stored.get(name, name) for name in self.entries()} - {"weight"}
        ordinary = self._shape(self._kernel_shape())
        if others and variables.keys() - values.keys() == others and values["0"].shape == ordinary:
            for name, value in self.start(values["0"], self.spec).items():
                values["0" if name == "weight" else self.stored.get(name, name)] = value
        self._check_entries(values, variables)
        for name, variable in variables.items():
            variable.assign(values[name])

    def _kernel_shape(self) -> tuple[int, ...]:
        return self.kind.conv(self.spec).kernel_shape

    def _shape(self, canonical: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that an array of `canonical` shape has in Keras' layout."""
        groups = self.kind.conv(self.spec).groups
        shape: tuple[int, ...] = from_canonical(np.empty(canonical), self.layout, groups).shape
        return shape

    def _stored_variables(self) -> dict[str, Any]:
        entries = self.entries()
        ordinary = [v for v in (entries.pop("weight"), *self._behind_the_kernel()) if v is not None]
        variables = {str(n): variable for n, variable in enumerate(ordinary)}
        return variables | {self.stored.get(name, name): v for name, v in entries.items()}

    def _behind_the_kernel(self) -> list[Any]:
        return [self.bias]

    def _check_entries(self, values: dict[str, Any], variables: dict[str, Any]) -> None:
        if not values:
            raise ValueError(
                f"layer {self.name!r}: the store has no entries for it. Keras stores the layers of "
                "a Sequential or functional model by class, so that an ordinary model's weights "
                "are found by an ordinary model alone: go on from that with from_conv or "
                "load_state."
            )
        if values.keys() != variables.keys():
            raise ValueError(
                f"layer {self.name!r}: found the entries {', '.join(map(repr, values))}; expected "
                f"{', '.join(map(repr, variables))}, or those of a {self.ordinary.__name__}."
            )
        for name, variable in variables.items():
            found, expected = tuple(values[name].shape), tuple(variable.shape)
            if found != expected:
                raise ValueError(
                    f"layer {self.name!r}: entry {name!r} has shape {found}; expected {expected}."
                )


def _module_of(name: str) -> Any:
    """Return the module of Keras for an argument that ends in initializer, regularizer, …"""
    return getattr(keras, f"{name.rpartition('_')[2]}s")


class ComposedLayers(composed.ComposedLayers):
    """A composed kind's layers in Keras. A layer is converted where it stands."""

    def obstacle(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> str | None:
        """Return why a convolution is left that nothing else keeps from being replaced."""
        reason = super().obstacle(view, layer, options)
        if reason is None:
            prefix = self.types[type(layer)].prefixes["weight"]
            if getattr(layer, f"{prefix}_constraint") is not None:
                return f"its {prefix}_constraint {ONE_WEIGHT}"
            if type(getattr(layer, f"{prefix}_regularizer")) not in (*DECAYS, type(None)):
                return f"its {prefix}_regularizer {EACH_WEIGHT}"
        return reason

    def prepare(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> Any:
        """Return the new layer."""
        cls = self.types[type(layer)]
        self.kind.spec(spec_of(layer), **options)  # which names the options as the caller does
        return cls.from_conv(layer, **{cls._option(name): each for name, each in options.items()})

    def convert(self, view: ModelView, chosen: Sequence[tuple[Site, Any]]) -> None:
        """Make ordinary layers the new ones, where they stand."""
        for site, new in chosen:
            become(site.layer, new)

    def plan(self, view: ModelView, site: Site, form: str) -> Folding:
        """Return the ordinary layer; NotFoldable for what computes something else."""
        if is_replaced(site.layer):
            raise NotFoldable(f"{REPLACED}.")
        new = site.layer.fold()
        return Folding(type(new).__name__, new)

    def fold(self, view: ModelView, planned: Sequence[tuple[Site, Folding]]) -> None:
        """Make the layers ordinary ones, where they stand."""
        for site, (_, new) in planned:
            become(site.layer, new)
