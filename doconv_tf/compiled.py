"""What compiling leaves in a Keras model, and functions compiled from it."""

from __future__ import annotations

import keras

from doconv_tf.view import first_occurrences

# A model that is not compiled. What compiling adds belongs to the variables of then.
UNCOMPILED = {
    "compiled": False, "loss": None, "steps_per_execution": 1, "_compile_loss": None,
    "_compile_metrics": None, "_loss_tracker": None, "_jit_compile": None, "_run_eagerly": False,
    "train_function": None, "test_function": None, "predict_function": None,
}  # fmt: skip
COMPILED = UNCOMPILED.keys() | {
    "optimizer", "stop_training", "_compile_config", "_compiled_trainable_state",
}  # fmt: skip


def uncompile(model: keras.Layer) -> None:
    """Make the model, and those inside it, such that were never compiled or called by `predict`."""
    for _, layer in first_occurrences(model):
        if isinstance(layer, keras.Model):
            for name in vars(layer).keys() & COMPILED:
                delattr(layer, name)  # which TensorFlow has on a list, too
            vars(layer).update(UNCOMPILED)


def compiled_parts(model: keras.Layer) -> list[object]:
    """Return what compiling and `predict` left in the model, and in those inside it.

    TensorFlow's tracking keeps the function that `predict` compiled, also once compiling has
    taken it from the model.
    """
    models = [layer for _, layer in first_occurrences(model) if isinstance(layer, keras.Model)]
    return [
        held[name]
        for each in models
        for held in (vars(each), vars(each).get("_self_unconditional_dependency_names", {}))
        for name in held.keys() & COMPILED
    ]


def check_functions(model: keras.Layer, inplace: bool) -> None:
    """Raise TypeError for a function that was compiled of the model: it goes on with the former.

    One that is the class's own, as by a decorator, is compiled for each model anew; so that it is
    in the way only where the model itself is changed.
    """
    for _, layer in first_occurrences(model):
        for name in {*dir(type(layer)), *vars(layer)} - UNCOMPILED.keys():
            own = name in vars(layer)
            member = vars(layer)[name] if own else getattr(type(layer), name, None)
            if hasattr(member, "get_concrete_function") and (own or inplace):
                advice = (
                    "Delete it, and compile it anew afterwards."
                    if own
                    else "Leave inplace out, and go on with the model that is returned."
                )
                raise TypeError(
                    f"{type(layer).__name__}.{name} is a compiled function, which would go on with "
                    f"the former layers. {advice}"
                )
