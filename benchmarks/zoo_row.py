"""What came of one network of the zoos."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from zoo_networks import Network


@dataclass
class Row:
    """What came of a network. problems: what did not hold.

    parameters: original, over-parameterized, folded. over, over_training: the largest absolute
    difference that over-parameterizing made, in evaluation and in training mode. moved: how many of
    its D the step moved. change: how far, relatively, training moved the outputs; folded, fused:
    how far folding did; rounding: how far changing the last bit of the batch norms' arrays does.
    norms: how many batch norms there were, and how many fusing left; unfused: those by reasons.
    """

    zoo: str
    name: str
    shape: tuple[int, ...]
    versions: str
    replaced: int | None = None
    left: dict[str, int] = field(default_factory=dict)
    parameters: tuple[int, ...] = ()
    over: float | None = None
    over_training: float | None = None
    loss: float | None = None
    moved: int | None = None
    change: float | None = None
    folded: float | None = None
    fused: float | None = None
    rounding: float | None = None
    norms: tuple[int, ...] = ()
    unfused: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def explanation(self, network: Network) -> str:
        """Return the network's explanation if it is of every problem of the row, else nothing."""
        beginning, explanation = network.failure or ("", "")
        fits = all(problem.startswith(beginning) for problem in self.problems)
        return explanation if fits and self.problems else ""

    def verdict(self, network: Network) -> str:
        """Return "ok", "explained" or "FAILED"."""
        if not self.problems:
            return "ok"
        return "explained" if self.explanation(network) else "FAILED"

    def record(self) -> dict[str, Any]:
        """Return the row as a dictionary that JSON can hold."""
        return asdict(self)
