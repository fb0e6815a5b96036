"""Which steps of a forward pass are one convolution, whatever the classes are called.

A part's forward pass is given as steps in their order: each is linear in its only input, a sum, or
anything else. Steps in a row and terms of a sum become one piece where that is exact; what of this
is worth it is chosen in the end, so that nothing costs more multiply-accumulates than before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from doconv_core.maths.linear import (
    COSTLIER,
    UNIT,
    NotOne,
    Piece,
    Scale,
    Taps,
    macs_in_a_row,
    plus,
    then,
)
from doconv_core.models.report import Change, Left

Key: TypeAlias = Any  # of a result: whatever can be a key of a dict

# Why branches are left that look like some.
APART = "its terms begin at different values: something that is not linear stands in between"
USED = "the result of a branch is used elsewhere too"


@dataclass(eq=False)
class Node:
    """Steps that are one piece. key: of their result. source: of the result that they take.

    parts: what they are if they stay apart. macs: the fewest multiply-accumulates of these for one
    position. convolutions, sums: how many of them are in it. signs: of the parts, 1 or -1, where
    they are added up.
    """

    key: Key
    source: Key
    piece: Piece
    steps: frozenset[Key] = frozenset()
    parts: tuple[Node, ...] = ()
    macs: float = 0
    convolutions: int = 0
    sums: int = 0
    signs: tuple[int, ...] = ()

    @property
    def ends(self) -> list[tuple[int, Key]]:
        """Signs and keys of the results whose sum it is: one, but of some of a sum's terms."""
        if not self.signs or self.key in self.steps:
            return [(1, self.key)]
        parts = zip(self.signs, self.parts, strict=True)
        return [(sign * each, key) for sign, part in parts for each, key in part.ends]

    @property
    def best(self) -> float:
        """The fewest multiply-accumulates for one position, as one or apart."""
        return min(self.macs, self.piece.macs)

    @property
    def is_one(self) -> bool:
        """Whether the steps are to become one convolution; a batch norm alone is no reason."""
        taps = isinstance(self.piece, Taps) and not self.piece.alike and self.convolutions
        worth = self.parts and (self.sums or self.convolutions > 1)
        return bool(taps and worth and self.piece.macs <= self.macs)


def atom(piece: Piece) -> Node:
    """Return a node of one layer or operation, whatever its place."""
    convolutions = isinstance(piece, Taps) and not piece.alike
    return Node(None, None, piece, macs=piece.macs, convolutions=int(convolutions))


class Step(NamedTuple):
    """One step of a forward pass.

    key: of its result. inputs: of the results that it takes. node: what it is, if it is linear in
    its only input. signs: of a sum's inputs, 1 or -1; else empty. reason: why it is not linear
    after all that is of a kind that can be.
    """

    key: Key
    inputs: tuple[Key, ...]
    node: Node | None = None
    signs: tuple[int, ...] = ()
    reason: str = ""


class Term(NamedTuple):
    """A term of a sum. sign: 1 or -1. key: of a result. node: what becomes one convolution."""

    sign: int
    key: Key
    node: Node | None


class Merge(NamedTuple):
    """A result that becomes the sum of these terms, mostly of one."""

    key: Key
    terms: tuple[Term, ...]

    @property
    def nodes(self) -> list[Node]:
        """What becomes a convolution each."""
        return [term.node for term in self.terms if term.node is not None]


class Refusal(NamedTuple):
    """Steps that look like branches and stay. key: of their result. reason: why."""

    key: Key
    reason: str


@dataclass
class Found:
    """What a forward pass comes to. whole: what it computes of its only input, if linear."""

    merges: list[Merge] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    whole: Node | None = None


class Part(ABC):
    """A part of a model, with a forward pass of its own. layer: what it is. path, kind: of that."""

    path: str
    kind: str
    layer: Any

    @abstractmethod
    def steps(self, known: Mapping[int, Node]) -> tuple[Sequence[Step], Key]:
        """Return the steps of the forward pass, and the key of what it returns.

        known: what parts inside are of their only input, by the layers' `id`.
        """

    @abstractmethod
    def obstacle(self, merge: Merge) -> str | None:
        """Return why steps cannot become one convolution in this model; None where they can."""

    @abstractmethod
    def replace(self, merges: Sequence[Merge]) -> list[Change]:
        """Let the part compute these convolutions in place of their steps."""


def merge_branches(parts: Sequence[Part]) -> tuple[list[Change], list[Left]]:
    """Make one convolution of steps wherever they are one, in place; return that, and what stays.

    parts: those inside others before them.
    """
    known: dict[int, Node] = {}
    changed, left, planned = list[Change](), list[Left](), list[tuple[Part, list[Merge]]]()
    for part in parts:
        found, merges = search(*part.steps(known)), []
        reasons = [refusal.reason for refusal in found.refusals]
        for merge in found.merges:
            reason = part.obstacle(merge)
            if reason is None:
                merges.append(merge)
            else:
                reasons.append(reason)
        if found.whole is not None:
            known[id(part.layer)] = found.whole
        left = [*(Left(part.path, part.kind, each) for each in dict.fromkeys(reasons)), *left]
        planned.append((part, merges))
    for part, merges in planned:  # in which nothing is rounded until all is known
        changed = [*part.replace(merges), *changed]
    return changed, left


def search(steps: Sequence[Step], output: Key) -> Found:
    """Return which steps become one convolution. output: the key of what the pass returns.

    A result that no step makes is the pass's input.
    """
    return _Search(steps, output).found()


@dataclass
class _Cluster:
    """Terms of a sum that are one piece. signed: each term's sign and node."""

    piece: Piece
    signed: list[tuple[int, Node]]
    best: float


class _Search:
    def __init__(self, steps: Sequence[Step], output: Key) -> None:
        self.steps, self.output = {step.key: step for step in steps}, output
        self.nodes: dict[Key, Node] = {}  # of those steps that are linear, by their results
        self.sums: dict[Key, list[Term]] = {}  # of those that are not one piece
        self.refused: list[tuple[frozenset[Key], Refusal]] = []
        self.users: dict[Key, list[Key]] = {output: [None]}
        for step in steps:
            for each in step.inputs:
                self.users.setdefault(each, []).append(step.key)

    def found(self) -> Found:
        for step in self.steps.values():
            if step.node is not None:
                own = step.node
                self._put(
                    Node(
                        step.key, step.inputs[0], own.piece, frozenset({step.key}), (), own.best,
                        1 if own.is_one else own.convolutions,
                    )
                )  # fmt: skip
            elif step.signs:
                node = self._sum(step)
                if node is not None:
                    self._put(node)
        merges = [*self._merges()]
        gone = frozenset().union(*(n.steps for merge in merges for n in merge.nodes))
        refusals = dict.fromkeys(r for steps, r in self.refused if not steps <= gone)
        return Found(merges, [*refusals], self._whole())

    def _whole(self) -> Node | None:
        if self.output not in self.steps:
            return atom(UNIT)
        last = self.nodes.get(self.output)
        return None if last is None or last.source in self.steps else last

    def _put(self, node: Node) -> None:
        """Take note of steps that are one piece, with what stands before them where that is too."""
        self._take(node)
        before = self.nodes.get(node.source)
        if before is not None and set(self.users[before.key]) == {node.key}:
            try:
                piece = then(before.piece, node.piece)
            except NotOne as reason:
                if before.convolutions and node.convolutions and str(reason) != COSTLIER:
                    self._refuse(node.key, before.steps | node.steps, str(reason))
            else:
                macs = macs_in_a_row(before.best, node.piece) + node.best
                node = _joined(node.key, before.source, piece, (before, node), macs)
                self._take(node)
        self.nodes[node.key] = node

    def _take(self, node: Node) -> None:
        """Let one node be the user of what its steps take; they are nobody else's any more."""
        for key in node.steps:
            self.nodes.pop(key, None)
            self.sums.pop(key, None)
        users = self.users[node.source]
        self.users[node.source] = [node.key if each in node.steps else each for each in users]

    def _refuse(self, key: Key, steps: frozenset[Key], reason: str) -> None:
        self.refused.append((steps, Refusal(key, reason)))

    def _sum(self, step: Step) -> Node | None:
        """Return a sum as one piece; or None, and what is left of its terms is in `sums`."""
        inner = frozenset({step.key, *(k for k in step.inputs if self._is_inner(k, step))})
        by_source: dict[Key, list[tuple[int, Node]]] = {}
        for sign, node in self._terms(step):
            by_source.setdefault(node.source, []).append((sign, node))
        clusters = [each for group in by_source.values() for each in self._clusters(step, group)]
        if len(clusters) == 1:
            return self._one(step.key, clusters[0], inner)
        terms = []
        for cluster in clusters:
            node = self._one(step.key, cluster, frozenset())
            if len(cluster.signed) > 1 and node.is_one:
                terms.append(Term(1, None, node))
                for key in node.steps:
                    self.nodes.pop(key, None)
            else:
                terms += [self._left(sign, each) for sign, each in cluster.signed]
        for key in inner:
            self.sums.pop(key, None)
        self.sums[step.key] = terms
        reasons = (self.steps[key].reason for key in by_source if key in self.steps)
        known = next(filter(None, reasons), None)
        if known is not None:
            self._refuse(step.key, frozenset({step.key}), known)
        elif len(by_source) > 1 and any(c.signed[0][1].convolutions for c in clusters):
            ends = [self.nodes[t.key] for t in terms if t.node is None and t.key in self.nodes]
            shared = any(n.convolutions and len(set(self.users[n.key])) > 1 for n in ends)
            self._refuse(step.key, frozenset({step.key}), USED if shared else APART)
        return None

    def _is_inner(self, key: Key, step: Step) -> bool:
        """Return whether a result is a sum that is no more than a part of this one."""
        return key in self.sums and self.users[key] == [step.key]

    def _terms(self, step: Step) -> Iterator[tuple[int, Node]]:
        """Yield a sum's terms, those of a sum among them that nobody else uses; with their signs.

        What is no piece, or is used elsewhere too, is the identity of itself.
        """
        for sign, key in zip(step.signs, step.inputs, strict=True):
            if self._is_inner(key, step):
                for term in self.sums[key]:
                    known = term.node or self.nodes.get(term.key)
                    if known is None or (term.node is None and len(self.users[term.key]) > 1):
                        known = Node(term.key, term.key, UNIT)
                    yield sign * term.sign, known
            elif key in self.nodes and self.users[key] == [step.key]:
                yield sign, self.nodes[key]
            else:
                yield sign, Node(key, key, UNIT)

    def _left(self, sign: int, node: Node) -> Term:
        """Return a term that stays: a result, or what an inner sum has made one convolution."""
        own = not node.steps or self.nodes.get(node.key) is node
        return Term(sign, node.key, None) if own else Term(sign, None, node)

    def _clusters(self, step: Step, group: list[tuple[int, Node]]) -> list[_Cluster]:
        """Return a sum's terms of one value by what can be one convolution."""
        clusters: list[_Cluster] = []
        for sign, node in sorted(group, key=lambda term: -term[1].piece.macs):
            piece, reason = then(node.piece, Scale(UNIT.factor * sign)), ""
            for cluster in clusters:
                try:
                    joined = plus(cluster.piece, piece)
                except NotOne as error:
                    reason = str(error)
                    continue
                if joined.macs <= cluster.best + node.best:
                    cluster.piece, cluster.best = joined, joined.macs
                    cluster.signed.append((sign, node))
                    break
                reason = COSTLIER
            else:
                if clusters and clusters[0].signed[0][1].convolutions:
                    self._refuse(step.key, node.steps | {step.key}, reason)
                clusters.append(_Cluster(piece, [(sign, node)], node.best))
        return clusters

    def _one(self, key: Key, cluster: _Cluster, steps: frozenset[Key]) -> Node:
        """Return a cluster's terms as a node. steps: those of the sum itself that are gone then."""
        nodes = tuple(node for _, node in cluster.signed)
        macs = sum(node.best for node in nodes)
        signs = tuple(sign for sign, _ in cluster.signed)
        return _joined(key, nodes[0].source, cluster.piece, nodes, macs, steps, 1, signs)

    def _merges(self) -> Iterator[Merge]:
        for key, terms in self.sums.items():
            if any(term.node is not None for term in terms):
                yield Merge(key, tuple(terms))
        for node in self.nodes.values():
            yield from self._chosen(node)

    def _chosen(self, node: Node) -> Iterator[Merge]:
        """Yield a node's merge; where it is to be none, those of its parts."""
        if node.is_one:
            yield Merge(node.key, (Term(1, None, node),))
            return
        if node.piece.macs > node.macs and node.sums:
            self._refuse(node.key, node.steps, COSTLIER)
        for part in node.parts:
            yield from self._chosen(part)


def _joined(
    key: Key,
    source: Key,
    piece: Piece,
    parts: tuple[Node, ...],
    macs: float,
    steps: frozenset[Key] = frozenset(),
    sums: int = 0,
    signs: tuple[int, ...] = (),
) -> Node:
    """Return nodes that are one piece together."""
    return Node(
        key,
        source,
        piece,
        steps.union(*(part.steps for part in parts)),
        parts,
        macs,
        sum(part.convolutions for part in parts),
        sums + sum(part.sums for part in parts),
        signs,
    )
