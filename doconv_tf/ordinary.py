"""Making a layer like another: between Keras' ordinary layers and those that stand in for them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
from keras import ops


def policy_of(layer: keras.Layer) -> Any:
    """Return the dtype policy in force for `layer`, also where a map gives one to each path."""
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap) and layer.path:
        return policy[layer.path]
    return policy


def like(
    old: keras.Layer, cls: type[keras.Layer], options: dict[str, Any] | None = None
) -> keras.Layer:
    """Return a new, built `cls` with the arguments of `old`, and all its variables but the kernel.

    options: further arguments, or others.
    The arguments are passed on as objects, so that what Keras could not serialize is kept too. The
    initializers come last: no random number is drawn only to be overwritten.
    """
    ordinary = getattr(cls, "ordinary", cls)
    parameters = inspect.signature(ordinary.__init__).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
    arguments = {name: getattr(old, name) for name in names}
    arguments["activation"] = _unshared(old.activation)
    initializers = {name: arguments[name] for name in names if name.endswith("_initializer")}
    arguments |= {**dict.fromkeys(initializers, "zeros"), **(options or {})}
    layer = cls(
        **arguments, name=old.name, dtype=policy_of(old), trainable=old.trainable,
        autocast=old.autocast,
    )  # fmt: skip
    with name_scopes(old):
        layer.build_from_config(old.get_build_config())
    for name, initializer in initializers.items():
        setattr(layer, name, initializer)
    for name in ("pointwise_kernel", "bias"):
        variable = getattr(old, name, None)
        if variable is not None:
            put(getattr(layer, name), variable)
            getattr(layer, name).trainable = variable.trainable
    return layer


def put(variable: Any, value: Any) -> None:
    """Give a variable a copy of this value.

    Where Keras runs on JAX, `assign` takes over the array itself, and what trains the one variable
    then deletes the other's.
    """
    variable.assign(ops.copy(value))


@contextmanager
def name_scopes(layer: keras.Layer) -> Iterator[None]:
    """Open the name scopes in which a layer was built: they are in the paths of its variables."""
    with ExitStack() as stack:
        for name in (layer.path or "").split("/")[:-1]:
            stack.enter_context(keras.name_scope(name))
        yield


def _unshared(activation: Any) -> Any:
    """Return an activation for a second layer: a clone of one that has weights, or may get some."""
    if not isinstance(activation, keras.Layer) or (activation.built and not activation.variables):
        return activation
    config = activation.get_config()
    if "dtype" in config:
        config["dtype"] = policy_of(activation)
    clone = type(activation).from_config(config)
    if activation.built and not clone.built:
        clone.build_from_config(activation.get_build_config())
    for new, old in zip(clone.variables, activation.variables, strict=True):
        put(new, old)
        new.trainable = old.trainable
    return clone
