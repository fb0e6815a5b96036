"""Where Keras trains on TensorFlow: one device, several, or several machines.

All that training needs of TensorFlow itself. It is imported when it is needed, as Keras, and so the
rest of this package, also runs without it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras

from doconv_core.maths.numeric import Array
from doconv_tf.private import strategy_of

CLUSTER = "TF_CONFIG"
JOBS = ("chief", "worker")  # of processes that train, the first of which is the one that writes


class Devices:
    """The devices that a model is trained on, and the other processes.

    strategy: TensorFlow's, in whose scope the model's variables are to be; None for one device.
    replicas: how many this process has. process, processes: which of how many this is.
    """

    process, processes = 0, 1

    def __init__(self, strategy: Any = None) -> None:
        self.strategy = strategy
        self.replicas = 1
        self.names = ["default"]
        if strategy is not None:
            self.names = list(strategy.extended.worker_devices)
            self.replicas = len(self.names)
            self._number_processes()
        self._sum: Callable[[Any], Any] | None = None

    def _number_processes(self) -> None:
        resolver = self.strategy.cluster_resolver
        spec = None if resolver is None else resolver.cluster_spec()
        if spec:
            jobs = [job for job in JOBS if job in spec.jobs]
            tasks = [(job, task) for job in jobs for task in range(spec.num_tasks(job))]
            self.processes = len(tasks)
            self.process = tasks.index((resolver.task_type, resolver.task_id))

    @property
    def version(self) -> str:
        """TensorFlow's."""
        import tensorflow as tf

        return f"tensorflow {tf.__version__}"

    def scope(self) -> Any:
        """Return the scope in which variables are made."""
        import tensorflow as tf

        return (self.strategy or tf.distribute.get_strategy()).scope()

    def compiled(self, function: Callable[[Iterator[Any]], Any], pieces: list[Any]) -> Any:
        """Return a function of such pieces, which lets Keras' own take them, one in each replica.

        function: `train_function` or `test_function` of a model. pieces: nested arrays for each
        replica; it is compiled once for all lengths of the first axis.
        The thread that calls hands them over. A data set would be drawn in a thread of TensorFlow's
        own: where Python's garbage collection takes the data set away while that thread waits for
        Python, both wait for ever.
        """
        import tensorflow as tf

        def spec(array: Array) -> Any:
            return tf.TensorSpec((None, *array.shape[1:]), array.dtype)

        def call(*given: Any) -> None:
            if self.strategy is None:
                (values,) = given
            else:
                values = self.strategy.experimental_distribute_values_from_function(
                    lambda context: given[context.replica_id_in_sync_group % self.replicas]
                )
            function(iter([values]))

        signature = keras.tree.map_structure(spec, tuple(pieces))
        return tf.function(call, input_signature=signature, autograph=False)

    def placed(self, pieces: list[Any]) -> list[Any]:
        """Return the pieces as tensors, each on the device of its replica."""
        import tensorflow as tf

        if self.strategy is None:
            return pieces
        found = []
        for name, piece in zip(self.names, pieces, strict=True):
            with tf.device(name):
                found.append(keras.tree.map_structure(tf.convert_to_tensor, piece))
        return found

    def of_replicas(self, variable: Any) -> list[Any]:
        """Return what a variable is in each of this process's replicas; does not wait for it."""
        if self.strategy is None:
            return [variable.value.read_value()]
        local = self.strategy.experimental_local_results(variable.value)
        return [each.read_value() for each in local]

    def any(self, flag: bool) -> bool:
        """Return whether it is so in any of the processes."""
        return self.total([float(flag)])[0] > 0

    def total(self, numbers: Iterable[float]) -> list[float]:
        """Return the sums of numbers over the processes, in float64."""
        import tensorflow as tf

        if self.processes == 1:
            return list(numbers)
        strategy, replicas = self.strategy, self.replicas

        def summed(values: Any) -> Any:
            context = tf.distribute.get_replica_context()
            is_first = tf.equal(context.replica_id_in_sync_group % replicas, 0)
            own = tf.where(is_first, values, tf.zeros_like(values))
            return context.all_reduce(tf.distribute.ReduceOp.SUM, own)

        if self._sum is None:
            self._sum = tf.function(lambda values: strategy.run(summed, (values,)))
        found = self._sum(tf.constant(list(numbers), tf.float64))
        result: list[float] = strategy.experimental_local_results(found)[0].numpy().tolist()
        return result


def devices_for(model: keras.Layer, devices: str | int | None) -> Devices:
    """Return the devices to train a model on; ValueError for what is not here.

    devices: how many; or names, such as "gpu:1", with commas between them; None for those of the
    strategy in whose scope the model was made, or else TensorFlow's default.
    """
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "train goes through tf.distribute and tf.function, and Keras runs on "
            f"{keras.backend.backend()}; set KERAS_BACKEND=tensorflow before Keras is imported, or "
            "fit the model yourself."
        )
    made_in = strategy_of(model.variables)
    if made_in is not None:
        if devices is not None:
            raise ValueError(
                "the model was made in the scope of a strategy, which has its devices: leave "
                f"devices out; received devices={devices!r}."
            )
        return Devices(made_in)
    if _workers() > 1:
        raise ValueError(
            f"{CLUSTER} tells of {_workers()} processes, and the model was not made for them: make "
            "it in the scope of doconv_tf.cluster_scope(), at the start of the program."
        )
    names = _names(devices)
    if len(names) < 2 and not isinstance(devices, str):
        return Devices()
    import tensorflow as tf

    return Devices(tf.distribute.MirroredStrategy(names))


def cluster_scope() -> AbstractContextManager[Any]:
    """Return the scope in which a model is made that TF_CONFIG's processes are to train.

    Where there is one process alone it changes nothing. It must be the first thing that TensorFlow
    does in each process, which waits in it for the others.

    >>> with cluster_scope():
    ...     model = get_model("tutorial_tf")
    >>> model.output_shape
    (None, 10)
    """
    scope: AbstractContextManager[Any] = nullcontext()
    if _workers() > 1:
        import tensorflow as tf

        scope = tf.distribute.MultiWorkerMirroredStrategy().scope()
    return scope


def _workers() -> int:
    """Return of how many processes TF_CONFIG tells."""
    cluster = json.loads(os.environ.get(CLUSTER, "{}")).get("cluster", {})
    return sum(len(cluster.get(job, ())) for job in JOBS)


def _names(devices: str | int | None) -> list[str]:
    """Return the names of the devices, each of which is here."""
    import tensorflow as tf

    logical = tf.config.list_logical_devices
    gpus, cpus = (
        [each.name.removeprefix("/device:").lower() for each in logical(kind)]
        for kind in ("GPU", "CPU")
    )
    if isinstance(devices, str) and not devices.isdigit():
        names = [name.strip().lower() for name in devices.split(",")]
        missing = [name for name in names if name not in (*gpus, *cpus)]
        if missing:
            raise ValueError(
                f"there is no device {missing[0]!r} here; there is {', '.join((*gpus, *cpus))}."
            )
        return names
    number, usable = 1 if devices is None else int(devices), gpus or cpus
    if not 1 <= number <= len(usable):
        raise ValueError(
            f"devices must be from 1 to {len(usable)}, the number of {', '.join(usable)}; received "
            f"devices={devices!r}."
        )
    return usable[:number]
