"""What this package uses of Keras that Keras does not document, each with the reason for it.

Nothing else in the package names a private part of Keras; a new version of Keras is checked here.
Written for Keras 3.10 to 3.15.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
from keras.src.ops.function import make_node_key, map_graph

# A functional model's place in other graphs, what a layer was told, and that it was called: what a
# layer has to keep that becomes another kind of layer where it stands.
PLACE = ("_inbound_nodes", "_outbound_nodes", "_called", "_supports_masking", "_remat_mode")
# The calls of an operation, which lead to other models, too.
NODES = ("_inbound_nodes", "_outbound_nodes")
# Functions that Keras gives to each layer on its own, and that hold the layer.
BOUND = ("build", "quantize")
# What is left of the last call. Its tensors may belong to a graph that is gone.
OF_A_CALL = {"_losses": list, "_loss_ids": set, "_losses_override": list}
# A model that is not compiled. What compiling adds belongs to the variables of then, and there is
# no public way back.
UNCOMPILED = {
    "compiled": False, "loss": None, "steps_per_execution": 1, "_compile_loss": None,
    "_compile_metrics": None, "_loss_tracker": None, "_jit_compile": None, "_run_eagerly": False,
    "train_function": None, "test_function": None, "predict_function": None,
}  # fmt: skip
COMPILED = UNCOMPILED.keys() | {
    "optimizer", "stop_training", "_compile_config", "_compiled_trainable_state",
}  # fmt: skip
# Functions of a layer or model that are Keras' own, and hold it.
OF_KERAS = COMPILED | {*BOUND}

# What a model holds its graph in.
_OF_A_GRAPH = {"_layers", "_functional", "_operations", "_operations_by_depth"}

# What TensorFlow notes of a layer's attributes, for its checkpoints.
_OF_TENSORFLOW = "_self_unconditional_"


def children(layer: keras.Layer) -> list[keras.Layer]:
    """Return the layers that this layer holds, each once, in its order.

    `Model.layers` is public, but of other layers there is no list.
    """
    found: list[keras.Layer] = layer._flatten_layers(include_self=False, recursive=False)
    return found


def own_variables(layer: keras.Layer) -> list[Any]:
    """Return the variables that are the layer's own: `variables` has those of its layers, too."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def trained_by(optimizer: keras.Optimizer) -> list[Any]:
    """Return the variables that an optimizer was built for; none before it has taken a step."""
    return list(getattr(optimizer, "_trainable_variables", ()))


def kernel_variable(conv: keras.Layer) -> Any:
    """Return the variable of a convolution's kernel: `kernel` is no variable with LoRA."""
    return conv._kernel


def exchange_activation(layer: keras.Layer, old: keras.Layer, new: keras.Layer) -> None:
    """Give a built layer another activation that is a layer: Keras has locked its parts by then."""
    layer._tracker.unlock()
    layer._tracker.untrack(old)
    layer.activation = new
    layer._tracker.lock()


def held_by(layer: keras.Layer) -> list[Any]:
    """Return the layers and variables that the layer's attributes hold, in whatever containers."""
    stores = {id(store) for _, store in layer._tracker.config.values()}
    own = {n: value for n, value in vars(layer).items() if not n.startswith(_OF_TENSORFLOW)}
    return _inside([value for value in own.values() if id(value) not in stores])


def _inside(todo: list[Any]) -> list[Any]:
    """Return the layers and variables among values, and in the containers among them."""
    found = []
    while todo:
        value = todo.pop()
        if isinstance(value, (keras.Layer, keras.Variable)):
            found.append(value)
        elif isinstance(value, (list, tuple, set, dict)):
            todo += value.values() if isinstance(value, dict) else value
    return found


def attributes_of(model: keras.Layer) -> list[Any]:
    """Return the layers that a model has in attributes of its own, beside its graph."""
    left = _OF_A_GRAPH | COMPILED
    own = {n: v for n, v in vars(model).items() if not n.startswith(_OF_TENSORFLOW)}
    return _inside([value for name, value in own.items() if name not in left])


def let_go(layer: keras.Layer, before: list[Any]) -> None:
    """Let a layer have no more what its attributes held before, and hold no more.

    Keras keeps a part whose attribute is set to something else, such as None.
    """
    held, tracker = {id(each) for each in held_by(layer)}, layer._tracker
    gone = {id(each): each for each in before if id(each) not in held}
    locked = tracker.locked
    tracker.unlock()
    for each in gone.values():
        tracker.untrack(each)
    if locked:
        layer._lock_state()
    for name, each in [*vars(layer).get(f"{_OF_TENSORFLOW}dependency_names", {}).items()]:
        if id(each) in gone:
            layer._delete_tracking(name)


def is_tracked(value: Any) -> bool:
    """Return whether the value is one of Keras' containers, which tell a tracker what they hold."""
    return isinstance(value, (list, dict, set)) and hasattr(value, "tracker")


def recount(tracker: Any) -> None:
    """Let the copy of a layer's tracker, if it is one, know what it tracks, which it has by id."""
    if hasattr(tracker, "stored_ids"):
        for name, (_, store) in tracker.config.items():
            tracker.stored_ids[name] = {id(value) for value in store}


def list_parameters(layer: keras.Layer) -> None:
    """Let a layer whose variables were exchanged list them anew, where Keras runs on PyTorch.

    There a layer is a `torch.nn.Module`, whose parameters Keras collects once it is built.
    """
    layer._post_build()


def graph_of(operation: Any) -> keras.Function | None:
    """Return the graph of a functional or sequential model; None for anything else.

    A `Sequential` keeps it to itself.
    """
    if isinstance(operation, keras.Function):
        return operation
    return operation._functional if isinstance(operation, keras.Sequential) else None


def nodes_of(function: keras.Function) -> list[Any]:
    """Return the calls in a graph, of which only the operations are public."""
    return [node for nodes in function._nodes_by_depth.values() for node in nodes]


def has_maker(tensor: Any) -> bool:
    """Return whether a tensor is a graph's, and knows the call that made it."""
    return getattr(getattr(tensor, "_keras_history", None), "operation", None) is not None


def maker_of(tensor: Any) -> Any:
    """Return the call that made a graph's tensor."""
    history = tensor._keras_history
    return history.operation._inbound_nodes[history.node_index]


def position_of(tensor: Any) -> int:
    """Return which of its call's outputs a graph's tensor is."""
    index: int = tensor._keras_history.tensor_index
    return index


def calls_of(operation: Any) -> list[Any]:
    """Return the calls of an operation, in whatever graph."""
    calls: list[Any] = operation._inbound_nodes
    return calls


def set_maker(tensor: Any, old: Any, node: Any) -> None:
    """Let the copy of a tensor know the copy of the call that made it. old: the original."""
    tensor._keras_history = old._keras_history._replace(
        operation=node.operation, node_index=_index(node)
    )


def put_result(tensor: Any, made: Any) -> None:
    """Let a graph's tensor be the result of the call that has just made another one."""
    node = maker_of(made)
    node.outputs = [tensor]
    tensor._keras_history = made._keras_history


def map_anew(model: keras.Layer) -> None:
    """Let a model have the calls that lead to its outputs now, and no layer of former ones.

    That is what Keras does when it makes a graph's model; a layer which an attribute has is kept.
    """
    function: Any = graph_of(model)
    former, calls = [*function._operations], nodes_of(function)
    names = ("_nodes", "_nodes_by_depth", "_operations", "_operations_by_depth")
    vars(function).update(zip(names, map_graph(function.inputs, function.outputs), strict=True))
    function.output_names = [maker_of(tensor).operation.name for tensor in function.outputs]
    gone = {id(node) for node in calls} - {id(node) for node in nodes_of(function)}
    for operation in function._operations:
        vars(operation)["_outbound_nodes"] = [
            node for node in operation._outbound_nodes if id(node) not in gone
        ]
    _hold(function, former)
    if model is not function:  # a Sequential, which may call a layer several times
        before, depths = held_by(model), sorted(function._nodes_by_depth, reverse=True)
        calls = [node for depth in depths for node in function._nodes_by_depth[depth]]
        model._layers = [node.operation for node in calls]
        let_go(model, before)


def _hold(function: Any, former: list[Any]) -> None:
    """Let a graph's model hold the layers that it calls now, in their order, and not the former."""
    tracker, kept = function._tracker, {id(each) for each in attributes_of(function)}
    called = {id(each) for each in function._operations}
    for each in former:
        if id(each) not in kept | called:
            tracker.untrack(each)
    for each in function.layers:
        tracker.track(each)
    order = {id(each): place for place, each in enumerate(function._operations)}
    function._layers.sort(key=lambda each: order.get(id(each), len(order)))


def set_keys(function: keras.Function) -> None:
    """Let the copy of a graph have the keys of its own calls, by which it finds them."""
    function._nodes = {make_node_key(node.operation, _index(node)) for node in nodes_of(function)}


def _index(node: Any) -> int:
    return next(i for i, other in enumerate(node.operation._inbound_nodes) if other is node)


def is_operation(operation: Any, names: tuple[str, ...]) -> bool:
    """Return whether this is one of Keras' own operations of these names; they have no types."""
    cls = type(operation)
    return cls.__name__ in names and cls.__module__.startswith("keras.src.ops")


def is_strategy(value: Any) -> bool:
    """Return whether this is a distribution strategy of TensorFlow's, without importing that.

    It is a part of the process, of which each variable and compiled function must have the same.
    """
    return any(
        cls.__name__ == "StrategyBase" and cls.__module__.startswith("tensorflow.")
        for cls in type(value).__mro__
    )


def strategy_scope(layer: keras.Layer) -> AbstractContextManager[Any]:
    """Return the scope of the distribution strategy that has the layer's variables, if one has.

    Keras asks TensorFlow for the strategy of now alone, and variables of two do not mix.
    """
    strategy = strategy_of(layer.weights)
    scope: AbstractContextManager[Any] = nullcontext() if strategy is None else strategy.scope()
    return scope


def is_of_keras(layer: keras.Layer) -> bool:
    """Return whether a layer's class is Keras' own, whose config tells of all that it holds."""
    return type(layer).__module__.startswith("keras.")


def follows_graph(layer: keras.Layer) -> bool:
    """Return whether a layer's call is Keras' own, which in a graph does what the graph says."""
    return "call" not in vars(layer) and type(layer).call.__module__.startswith("keras.")


def compiled_parts(model: keras.Model) -> list[object]:
    """Return what compiling and `predict` left in a model.

    TensorFlow's tracking keeps the function that `predict` compiled, also once compiling has
    taken it from the model.
    """
    own = vars(model)
    return [
        held[name]
        for held in (own, own.get("_self_unconditional_dependency_names", {}))
        for name in held.keys() & COMPILED
    ]


def uncompile(model: keras.Model) -> None:
    """Make a model one that was never compiled or called by `predict`."""
    for name in vars(model).keys() & COMPILED:
        delattr(model, name)  # which TensorFlow has on a list, too
    vars(model).update(UNCOMPILED)


def has_onednn() -> bool:
    """Return whether this process's TensorFlow computes with oneDNN.

    The only place that tells what was built, asked for by TF_ENABLE_ONEDNN_OPTS, and possible.
    """
    from tensorflow.python.util import _pywrap_util_port  # heavy, and not there on other backends

    found: bool = _pywrap_util_port.IsMklEnabled()
    return found


class SummedFirst(keras.optimizers.Optimizer):
    """An optimizer that is given the gradients of all replicas together before it does anything.

    Keras clips gradients before it adds up those of the replicas, and has no public place between
    that and the update of each variable.
    """

    def prepared(self, gradients: list[Any], variables: list[Any]) -> list[Any]:
        """Return the gradients to update by, of the sums over replicas, in a replica's context."""
        return gradients

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> list[tuple[Any, Any]]:
        pairs = super()._all_reduce_sum_gradients(grads_and_vars)
        gradients, variables = map(list, zip(*pairs, strict=True))
        return list(zip(self.prepared(gradients, variables), variables, strict=True))


def strategy_of(variables: list[Any]) -> Any:
    """Return the distribution strategy in whose scope one of the variables was made; else None."""
    found = (getattr(each.value, "_distribute_strategy", None) for each in variables)
    return next((each for each in found if each is not None), None)


def made_anew(variable: Any) -> Any:
    """Give a variable a value of TensorFlow's own, made in the strategy of now; return the former.

    A variable of Keras' holds one of TensorFlow's, which belongs to the strategy of when it was
    made.
    """
    former = variable._value
    variable._initialize(former.numpy())
    return former


def exchange(variable: Any, value: Any) -> Any:
    """Let a variable hold this one of TensorFlow's, with the values of now; return the former."""
    former = variable._value
    value.assign(former.read_value())
    variable._value = value
    return former


def output_layer(model: keras.Layer) -> Any:
    """Return the layer that makes the only output of a model that is a graph; None of others."""
    graph = graph_of(model)
    outputs = [] if graph is None else keras.tree.flatten(graph.outputs)
    if len(outputs) != 1 or not has_maker(outputs[0]):
        return None
    last = maker_of(outputs[0]).operation
    return output_layer(last) or last
