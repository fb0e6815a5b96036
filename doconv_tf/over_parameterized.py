"""What the DO-Conv layers of Keras share: variables, composition, folding, storing, refusing.

Keras keeps the axes of a kernel in the order `(*kernel_size, I/g, O)`, and those of a depthwise
kernel in the order `(*kernel_size, I, O/I)`. W has the ordinary kernel's shape where `S == M`; else
`S` stands in the place of `*kernel_size`. D is `(I, M, S)`, as everywhere.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.layout import from_canonical
from doconv_core.maths.spec import ConvSpec
from doconv_tf.compose import as_weight, compose
from doconv_tf.ordinary import like, policy_of, put

D_ENTRY = "depthwise_kernel"  # D's name in a store, where the ordinary variables have numbers


class OverParameterized:
    """A mixin, to stand before the ordinary layer; `call` remains the ordinary layer's.

    Variables: `_kernel`, W; `depthwise_kernel`, D, zero at first, or None for a kernel of one tap;
    `bias`. W and D are never cast on reading: `kernel` is cast, once, after the composition.

    ordinary: the layer it stands in for. layout: the core's word for that layer's kernel.
    multiplier_name: of the argument S. w_prefix, d_prefix: with what the names of the arguments for
    W's and D's initializer, regularizer and constraint begin. kernel_name: the attribute that is
    the composed kernel; w_name: of W among the variables; d_name: the attribute that is D.
    `_spec(I)` gives the sizes.
    """

    ordinary: type[keras.Layer]
    layout: str
    multiplier_name: str
    w_prefix: str
    d_prefix: str
    kernel_name = w_name = "kernel"
    d_name = D_ENTRY

    def _set_depthwise(
        self, spec: ConvSpec, initializer: Any, regularizer: Any, constraint: Any
    ) -> None:
        """Finish the constructor: take the arguments about D. `spec` is for as few I as can be."""
        self._refuse_quantized(self.dtype_policy)
        setattr(self, self.multiplier_name, spec.depth_multiplier)
        setattr(self, f"{self.d_prefix}_initializer", keras.initializers.get(initializer))
        setattr(self, f"{self.d_prefix}_regularizer", keras.regularizers.get(regularizer))
        setattr(self, f"{self.d_prefix}_constraint", keras.constraints.get(constraint))

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create W, the bias and D for inputs of this shape, which includes the batch."""
        axis = -1 if self.data_format == "channels_last" else 1
        spec = self._spec(input_shape[axis])
        self._refuse_quantized(policy_of(self))
        self.compute_output_shape(input_shape)  # raises where nothing would be left
        self.input_spec = keras.InputSpec(min_ndim=self.rank + 2, axes={axis: spec.in_channels})
        self.spec = spec
        shape = self._shape(spec.parameter_shape)
        self._kernel = self._add(self.w_name, shape, self.w_prefix, False)
        self._add_ordinary(spec)
        depthwise = None
        if spec.depthwise_shape is not None:
            depthwise = self._add(self.d_name, spec.depthwise_shape, self.d_prefix, False)
            if depthwise.regularizer is None:
                depthwise.regularizer = self._kernel.regularizer
        setattr(self, self.d_name, depthwise)

    def _add_ordinary(self, spec: ConvSpec) -> None:
        """Create what the ordinary layer has behind its kernel."""
        self.bias = self._add("bias", (spec.out_channels,), "bias", True) if self.use_bias else None

    def _add(self, name: str, shape: tuple[int, ...], prefix: str, autocast: bool) -> Any:
        options = {
            kind: getattr(self, f"{prefix}_{kind}")
            for kind in ("initializer", "regularizer", "constraint")
        }
        return self.add_weight(name=name, shape=shape, autocast=autocast, **options)

    @property
    def kernel(self) -> Any:
        """The composed kernel, as `composed_kernel()` gives it, in the layer's compute dtype."""
        if not self.built:
            raise AttributeError(f"layer {self.name!r} has no kernel before it is built.")
        return ops.cast(self.composed_kernel(), self.compute_dtype)

    def composed_kernel(self) -> Any:
        """Return the kernel that the layer convolves with, in Keras' layout.

        It is composed in the variables' dtype, with mixed precision too, and differentiable. From
        variables of half precision it is composed in float32 and rounded once. A kernel of one tap
        is W itself. Raises ValueError if the layer is not built.
        """
        self._require_built()
        depthwise = getattr(self, self.d_name)
        if depthwise is None:
            return ops.convert_to_tensor(self._kernel)
        kernel = compose(self._kernel, depthwise, self.spec)
        return ops.reshape(kernel, self._shape(self.spec.kernel_shape))

    def fold(self) -> keras.Layer:
        """Return a new ordinary layer, built, with the same function.

        It keeps name, dtype policy and configuration. Its kernel is trainable where W or D is. An
        activation that is a layer with weights is cloned. Raises ValueError if the layer is not
        built, NotFoldable for a subclass that computes something else.
        """
        self.check_foldable()
        layer = like(self, self.ordinary)
        kernel = getattr(layer, self.kernel_name)
        put(kernel, self.composed_kernel())
        kernel.trainable = any(v.trainable for v in self._composed_variables())
        return layer

    def check_foldable(self) -> None:
        """Raise what `fold` would raise."""
        cls = type(self)
        plain = {name: getattr(self.ordinary, name, None) for name in ("call", "convolution_op")}
        for name, method in {**plain, self.kernel_name: OverParameterized.kernel}.items():
            if getattr(cls, name, None) is not method:
                raise NotFoldable(
                    f"{cls.__module__}.{cls.__qualname__} has a {name} of its own, so the "
                    "convolution it would be folded to might compute something else; fold() is for "
                    "the plain layer."
                )
        self._require_built()

    @classmethod
    def _from_conv(cls, conv: keras.Layer, multiplier: int | None) -> Any:
        check_ordinary(cls, conv)
        layer = like(conv, cls, {cls.multiplier_name: multiplier})
        kernel = getattr(conv, cls.kernel_name)
        put(layer._kernel, as_weight(kernel, layer.spec))
        for variable in layer._composed_variables():
            variable.trainable = kernel.trainable
        return layer

    def own_names(self) -> frozenset[str]:
        """Return the names of the attributes that this layer or the ordinary one has alone."""
        kinds = ("initializer", "regularizer", "constraint")
        names = {"spec", "_kernel", self.kernel_name, self.d_name, self.multiplier_name}
        names |= {f"{self.d_prefix}_{kind}" for kind in kinds}
        return frozenset(names)

    def get_config(self) -> dict[str, Any]:
        """Return the ordinary layer's configuration, and what concerns D."""
        initializer = getattr(self, f"{self.d_prefix}_initializer")
        regularizer = getattr(self, f"{self.d_prefix}_regularizer")
        constraint = getattr(self, f"{self.d_prefix}_constraint")
        return {
            **super().get_config(),
            self.multiplier_name: getattr(self, self.multiplier_name),
            f"{self.d_prefix}_initializer": keras.initializers.serialize(initializer),
            f"{self.d_prefix}_regularizer": keras.regularizers.serialize(regularizer),
            f"{self.d_prefix}_constraint": keras.constraints.serialize(constraint),
        }

    def save_own_variables(self, store: Any) -> None:
        """Store W as "0" and the bias as "1", as the ordinary layer does, and D by its name."""
        if self.built:
            for name, variable in self._stored_variables().items():
                store[name] = variable

    def load_own_variables(self, store: Any) -> None:
        """Load what this layer stored, or what the ordinary layer did; D is then zero.

        Raises ValueError for an entry that is missing, unknown or of another shape; nothing is
        assigned then.
        """
        values = {name: store[name] for name in store.keys()}  # noqa: SIM118
        if not self.built and not values:
            return
        self._require_built()
        variables = self._stored_variables()
        ordinary = self._shape(self.spec.kernel_shape)
        if variables.keys() - values.keys() == {D_ENTRY} and values["0"].shape == ordinary:
            values["0"] = as_weight(values["0"], self.spec)
            values[D_ENTRY] = ops.zeros(self.spec.depthwise_shape)
        self._check_entries(values, variables)
        for name, variable in variables.items():
            variable.assign(values[name])

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Refuse with NotImplementedError, which `Model.quantize` turns into a warning."""
        raise NotImplementedError(self._advice("cannot be quantized"))

    def quantized_build(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, as `quantize` does."""
        raise NotImplementedError(self._advice("cannot be quantized"))

    @property
    def dtype_policy(self) -> Any:
        """The layer's dtype policy. A quantized one is refused with ValueError."""
        return self._dtype_policy

    @dtype_policy.setter
    def dtype_policy(self, value: Any) -> None:
        self._refuse_quantized(keras.dtype_policies.get(value))
        keras.Layer.dtype_policy.fset(self, value)

    def _refuse_quantized(self, policy: Any) -> None:
        if policy.quantization_mode is not None:
            problem = f"cannot have the quantized dtype policy {policy.name!r}"
            raise ValueError(self._advice(problem))

    def _require_built(self) -> None:
        if not self.built:
            raise ValueError(f"layer {self.name!r} is not built; call it, or its build(), first.")

    def _shape(self, canonical: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that an array of `canonical` shape has in Keras' layout."""
        return from_canonical(np.empty(canonical), self.layout, self.spec.groups).shape

    def _composed_variables(self) -> list[Any]:
        return [v for v in (self._kernel, getattr(self, self.d_name)) if v is not None]

    def _stored_variables(self) -> dict[str, Any]:
        ordinary = [v for v in (self._kernel, *self._behind_the_kernel()) if v is not None]
        variables = {str(n): variable for n, variable in enumerate(ordinary)}
        depthwise = getattr(self, self.d_name)
        return variables if depthwise is None else {**variables, D_ENTRY: depthwise}

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

    def _advice(self, problem: str) -> str:
        return (
            f"{type(self).__name__} {problem}: its kernel is composed of two variables. Train it "
            f"as it is, then fold() it to a keras.layers.{self.ordinary.__name__}, and go on with "
            "that."
        )


def check_ordinary(cls: type[Any], conv: keras.Layer) -> None:
    """Raise TypeError or ValueError where `cls.from_conv` cannot take over this layer."""
    if type(conv) is not cls.ordinary:
        raise TypeError(
            f"{cls.__name__}.from_conv takes over a keras.layers.{cls.ordinary.__name__}, "
            f"exactly; received {type(conv).__module__}.{type(conv).__qualname__}."
        )
    if getattr(conv, "lora_enabled", False) or conv.quantization_mode is not None:
        raise TypeError(
            f"{cls.__name__}.from_conv needs a layer whose kernel is a plain variable; layer "
            f"{conv.name!r} is quantized or has LoRA enabled."
        )
    if not conv.built:
        raise ValueError(
            f"layer {conv.name!r} is not built, so it has no kernel to take over. Build it, or "
            f"create a {cls.__name__} in its place."
        )
