"""What a layer with a composed kernel refuses: what Keras does to a kernel that is a variable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from doconv_core.kinds.base import ComposedKind


class Unquantized(keras.Layer):
    """A layer that cannot be quantized, and cannot have LoRA. kind, ordinary: as of its class."""

    kind: ComposedKind
    ordinary: type[Any]

    def _refuse_lora_arguments(self, options: Mapping[str, Any]) -> None:
        for name in ("lora_rank", "lora_alpha"):
            if options.get(name) is not None:
                raise ValueError(self._advice(f"takes no {name}"))

    @property
    def enable_lora(self) -> Any:
        """What the ordinary layer may have of this name; to refuse with NotImplementedError.

        Keras would add LoRA's product to the weight, in a shape that it need not have.
        """
        getattr(self.ordinary, "enable_lora")  # noqa: B009  # AttributeError where it has not
        return self._refuse_lora

    def _refuse_lora(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(self._advice("cannot have LoRA"))

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Refuse with NotImplementedError, which `Model.quantize` turns into a warning."""
        raise NotImplementedError(self._advice("cannot be quantized"))

    def quantized_build(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, as `quantize` does."""
        raise NotImplementedError(self._advice("cannot be quantized"))

    @property
    def dtype_policy(self) -> Any:
        """The layer's dtype policy. A quantized one is refused with ValueError."""
        return keras.Layer.dtype_policy.fget(self)

    @dtype_policy.setter
    def dtype_policy(self, value: Any) -> None:
        self._refuse_quantized(keras.dtype_policies.get(value))
        keras.Layer.dtype_policy.fset(self, value)

    def _refuse_quantized(self, policy: Any) -> None:
        if policy.quantization_mode is not None:
            problem = f"cannot have the quantized dtype policy {policy.name!r}"
            raise ValueError(self._advice(problem))

    def _advice(self, problem: str) -> str:
        several = "two" if len(self.kind.names) == 2 else "several"
        return (
            f"{type(self).__name__} {problem}: its kernel is composed of {several} variables. "
            f"Train it as it is, then fold() it to a keras.layers.{self.ordinary.__name__}, and go "
            "on with that."
        )
