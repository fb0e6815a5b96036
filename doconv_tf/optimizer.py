"""The optimizers of recipes in Keras, by the rules that hold in every framework.

Keras' own keep the learning rate inside the momentum, and let weight decay pass the momentum by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from doconv_core.kinds.do_conv import DO_CONV
from doconv_core.training.fields import ADAMW, NESTEROV
from doconv_core.training.optimizer import TINY, role
from doconv_core.training.recipe import Recipe
from doconv_tf.private import SummedFirst

# What variables of Keras are called in states, where they are called otherwise there.
ENTRIES = {"d_kernel": DO_CONV.names[1], "scale": "gamma"}
# Of float16's loss, as PyTorch has it: the first factor, and after how many steps it is doubled.
FIRST_SCALE, GROWS_AFTER = 2.0**16, 2000


@keras.saving.register_keras_serializable(package="doconv")
class RecipeOptimizer(SummedFirst):
    """SGD, Nesterov's momentum or AdamW, as a recipe has them and PyTorch computes them.

    SGD: `g += decay·w`, `v = momentum·v + g`, `w -= rate·v`; Nesterov: `w -= rate·(g +
    momentum·v)`. AdamW: `w -= rate·decay·w`, then `w -= rate·m / (sqrt(s) + epsilon)`, where `m`
    and `s` are the means of gradients and squares, each divided by `1 - beta^steps`.

    The arguments are the fields of `doconv_core.training.Recipe` of these names, of which
    `momentum` is AdamW's first beta. Norms, biases and D are known by the names of their variables.
    parts: whether a step's gradient may come in parts, of which `last` tells which is the last.
    scaled: whether the loss is scaled, for float16; a step whose gradient overflows is left out.
    Gradients of several replicas are added up before anything is done with them.

    >>> optimizer = RecipeOptimizer("sgd", 0.1, momentum=0.9)
    >>> w = keras.Variable([1.0])
    >>> for rate in (0.1, 0.01):
    ...     optimizer.learning_rate = rate
    ...     optimizer.apply([keras.ops.ones(1)], [w])
    >>> round(float(w.numpy()[0]), 4)
    0.881
    """

    def __init__(
        self,
        optimizer: str = "sgd",
        learning_rate: float = 0.1,
        *,
        momentum: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        decay_exempt: Sequence[str] = (),
        clip_norm: float | None = None,
        parts: bool = False,
        scaled: bool = False,
        name: str = "recipe_optimizer",
    ) -> None:
        super().__init__(learning_rate=float(learning_rate), name=name)
        self.rule, self.momentum, self.beta2, self.epsilon = optimizer, momentum, beta2, epsilon
        self.decay, self.decay_exempt = weight_decay, tuple(decay_exempt)
        self.clip, self.parts, self.scaled = clip_norm, parts, scaled

    @classmethod
    def of(cls, recipe: Recipe, *, scaled: bool = False) -> RecipeOptimizer:
        """Return the optimizer of a recipe."""
        return cls(
            recipe.optimizer, recipe.learning_rate, momentum=recipe.momentum, beta2=recipe.beta2,
            epsilon=recipe.epsilon, weight_decay=recipe.weight_decay,
            decay_exempt=recipe.decay_exempt, clip_norm=recipe.clip_norm,
            parts=recipe.accumulate > 1, scaled=scaled,
        )  # fmt: skip

    def build(self, variables: list[Any]) -> None:
        """Make what is kept for each variable, and for all of them."""
        if self.built:
            return
        super().build(variables)
        adamw = self.rule == ADAMW
        self.first = self._kept(variables, "mean" if adamw else "velocity")
        self.second = self._kept(variables, "square") if adamw else []
        self.sums = self._kept(variables, "sum") if self.parts else []
        self.decays = [
            0.0 if role(ENTRIES.get(v.name, v.name)) in self.decay_exempt else self.decay
            for v in variables
        ]
        # Numbers that each replica has of its own, and are the same in all.
        self.steps = self._number("steps", 0.0)  # that were taken
        self.taking = self._number("taking", 1.0)  # whether one is taken now, 1 or 0
        self.last = self._number("last", 1.0)
        self.scale = self._number("loss_scale", FIRST_SCALE if self.scaled else 1.0)
        self.good = self._number("good_steps", 0.0)  # since the scale was changed

    def _kept(self, variables: list[Any], name: str) -> list[Any]:
        return [self.add_variable_from_reference(each, name=name) for each in variables]

    def _number(self, name: str, value: float) -> Any:
        start = keras.initializers.Constant(value)
        return self.add_variable((), start, "float32", name=name)

    @property
    def may_leave_out(self) -> bool:
        """Whether there are calls that change no weight."""
        return self.parts or self.scaled

    def scale_loss(self, loss: Any) -> Any:
        """Return the loss to take the gradient of."""
        return loss * ops.cast(self.scale, loss.dtype) if self.scaled else loss

    def prepared(self, gradients: list[Any], variables: list[Any]) -> list[Any]:
        """Return the gradients that weights are changed by, of those of all replicas together."""
        gradients = [ops.convert_to_tensor(each) for each in gradients]  # those that were sparse
        if self.parts:
            gradients = self._added(gradients, variables)
        taking = ops.convert_to_tensor(self.last)
        if self.scaled:
            gradients = [each / ops.cast(self.scale, each.dtype) for each in gradients]
            finite = ops.all(ops.stack([ops.all(ops.isfinite(each)) for each in gradients]))
            self._rescale(finite)
            taking = taking * ops.cast(finite, "float32")
        if self.may_leave_out:
            self.taking.assign(taking)
        self.steps.assign_add(taking)
        return self._clipped(gradients)

    def _added(self, gradients: list[Any], variables: list[Any]) -> list[Any]:
        """Return the gradients with those of the parts before; keep them until the last one."""
        last, added = ops.cast(self.last, "bool"), []
        for gradient, variable in zip(gradients, variables, strict=True):
            held = self.sums[self._get_variable_index(variable)]
            total = ops.cast(gradient, held.dtype) + held
            held.assign(ops.where(last, ops.zeros_like(total), total))
            added.append(total)
        return added

    def _rescale(self, finite: Any) -> None:
        """Halve the scale where gradients overflowed, and double it when it was long too small."""
        last, scale = ops.cast(self.last, "bool"), ops.convert_to_tensor(self.scale)
        good = ops.where(finite, ops.convert_to_tensor(self.good) + 1, ops.zeros(()))
        grows = good >= GROWS_AFTER
        new = ops.where(finite, ops.where(grows, scale * 2, scale), scale / 2)
        self.scale.assign(ops.where(last, new, scale))
        self.good.assign(ops.where(last, ops.where(grows, ops.zeros(()), good), self.good))

    def _clipped(self, gradients: list[Any]) -> list[Any]:
        if self.clip is None:
            return gradients
        squares = [ops.sum(ops.square(ops.cast(each, "float32"))) for each in gradients]
        norm = ops.sqrt(ops.sum(ops.stack(squares)))
        factor = ops.minimum(1.0, self.clip / (norm + TINY))
        return [each * ops.cast(factor, each.dtype) for each in gradients]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Change a variable by its gradient."""
        index, dtype = self._get_variable_index(variable), variable.dtype
        weight, rate = ops.convert_to_tensor(variable), ops.cast(learning_rate, dtype)
        rule = self._adamw if self.rule == ADAMW else self._sgd
        new, *kept = rule(weight, ops.cast(gradient, dtype), index, rate)
        held = [each[index] for each in (self.first, self.second) if each]
        for target, value in zip((variable, *held), (new, *kept), strict=True):
            if self.may_leave_out:
                taking = ops.cast(self.taking, "bool")
                value = ops.where(taking, value, ops.convert_to_tensor(target))
            self.assign(target, value)

    def _sgd(self, weight: Any, gradient: Any, index: int, rate: Any) -> tuple[Any, ...]:
        if self.decays[index]:
            gradient = gradient + self.decays[index] * weight
        velocity = self.momentum * ops.convert_to_tensor(self.first[index]) + gradient
        step = gradient + self.momentum * velocity if self.rule == NESTEROV else velocity
        return weight - rate * step, velocity

    def _adamw(self, weight: Any, gradient: Any, index: int, rate: Any) -> tuple[Any, ...]:
        mean = self._moment(self.first[index], gradient, self.momentum)
        square = self._moment(self.second[index], ops.square(gradient), self.beta2)
        unbiased, spread = (
            moment / ops.cast(self._correction(beta), weight.dtype)
            for moment, beta in ((mean, self.momentum), (square, self.beta2))
        )
        if self.decays[index]:
            weight = weight - rate * self.decays[index] * weight
        return weight - rate * unbiased / (ops.sqrt(spread) + self.epsilon), mean, square

    def _moment(self, before: Any, now: Any, beta: float) -> Any:
        return beta * ops.convert_to_tensor(before) + (1 - beta) * now

    def _correction(self, beta: float) -> Any:
        """Return `1 - beta^steps`, without the rounding of a power that is nearly 1."""
        # A step that is left out changes nothing, whatever it is divided by, except by 0.
        steps = ops.maximum(ops.convert_to_tensor(self.steps), 1.0)
        return -ops.expm1(steps * math.log(beta)) if beta else ops.ones(())

    def get_config(self) -> dict[str, Any]:
        """Return the arguments."""
        return {
            "optimizer": self.rule, "learning_rate": float(self.learning_rate.numpy()),
            "momentum": self.momentum, "beta2": self.beta2, "epsilon": self.epsilon,
            "weight_decay": self.decay, "decay_exempt": list(self.decay_exempt),
            "clip_norm": self.clip, "parts": self.parts, "scaled": self.scaled, "name": self.name,
        }  # fmt: skip
