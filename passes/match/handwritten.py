"""Recognises attention that is written out by hand, from the product of probabilities and value upwards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch.fx import Node

from ..graph.axes import Axis, Dim, Layout, Misaligned, Step, all_leaves, fresh, is_size, leaves, relayout
from ..graph.node_values import fake_tensor
from ..graph.operations import Cleaned, Dropout, Expanded, Narrowed, Permuted, Product, Same, Viewed
from ..graph.read_operations import read_operation
from ..mask.mask_tensors import MaskTensor
from .operator_inputs import Input, choose, fewest_axes, laid_out
from .score_masks import ScoreMask, mask_tensor
from .scores import ACTIVE_DROPOUT, NotAttention, Scores, ScoreWalk
from .site import AttentionSite
from .softmax import FoundSoftmax, find_softmax
from .walk import Changed, Walker, shape_of, source_layout


def handwritten_site(walker: Walker, node: Node, product: Product) -> AttentionSite | None:
    """The attention whose output is a product of probabilities and a value, if it is one."""
    if product.bias is not None or product.scale != 1:
        return None
    layout = fresh(shape_of(node))
    for swapped in (False, True):
        try:
            return _Matched.of(walker, node, product, layout, swapped).site()
        except (NotAttention, Misaligned, Changed):
            continue
    return None


def operand_layouts(product: Product, node: Node, layout: Layout) -> tuple[Layout, Layout, Dim]:
    """The axes of both operands of a product, from those of its result, and the axes that are summed over.

    Raises:
        Misaligned: They cannot be identified.
    """
    axes = dict(zip(product.axes, layout, strict=True))
    sizes = [
        dict(zip(names, shape_of(operand), strict=True))
        for names, operand in ((product.left_axes, product.left), (product.right_axes, product.right))
    ]
    for name in product.contracted:
        if not is_size(sizes[0][name], sizes[1][name]):
            raise Misaligned
        (axes[name],) = fresh((sizes[0][name],))
    left, right = (tuple(() if is_size(size, 1) else axes[name] for name, size in own.items()) for own in sizes)
    return left, right, all_leaves(tuple(axes[name] for name in product.contracted))


@dataclass
class _Probabilities:
    """The softmax that probabilities come from, the axes of its result, and the nodes on the way."""

    softmax: FoundSoftmax
    layout: Layout
    nodes: list[Node]
    obstacles: list[str]
    kept: tuple[Dim, int] | None

    @property
    def summed(self) -> Dim:
        """The axes that the softmax runs over."""
        return self.layout[self.softmax.dim]

    @property
    def keys(self) -> Dim:
        """Those of them that are used."""
        return leaves(self.summed if self.kept is None else self.kept[0])


def _probabilities(walker: Walker, node: Node, layout: Layout, user: Node) -> _Probabilities:
    nodes: list[Node] = []
    obstacles: list[str] = []
    narrowed: Narrowed | None = None
    kept: tuple[Dim, int] | None = None
    while True:
        node = walker.current(node, user, obstacles)
        softmax = find_softmax(node, walker)
        if softmax is not None:
            if narrowed is not None and narrowed.dim != softmax.dim:
                raise NotAttention
            return _Probabilities(softmax, layout, [*nodes, *softmax.nodes], obstacles, kept)
        operation = read_operation(node)
        if isinstance(operation, Narrowed) and narrowed is None:
            narrowed, kept = operation, (layout[operation.dim], operation.start)
            (dim,) = fresh((shape_of(operation.source)[operation.dim],))
            layout = (*layout[: operation.dim], dim, *layout[operation.dim + 1 :])
        elif narrowed is None and isinstance(operation, (Same, Cleaned, Dropout, Viewed, Permuted, Expanded)):
            if isinstance(operation, Dropout):
                obstacles.append(ACTIVE_DROPOUT)
            layout = source_layout(operation, node, layout, operation.source)
        else:
            raise NotAttention
        nodes.append(node)
        node, user = operation.source, node


@dataclass
class _Matched:
    """Both products of an attention and the axes of all that is between them."""

    walker: Walker
    node: Node
    layout: Layout
    value: Node
    value_layout: Layout
    summed: Dim
    probabilities: _Probabilities
    scores: Scores

    @classmethod
    def of(cls, walker: Walker, node: Node, product: Product, layout: Layout, swapped: bool) -> _Matched:
        """The match at a product of which `swapped` says whether the value is on the left.

        Raises:
            NotAttention: There is none.
            Misaligned: The dimensions cannot be identified.
            Changed: A tensor of it is changed in place in a way that cannot be followed.
        """
        left, right, summed = operand_layouts(product, node, layout)
        sides = [(product.left, left), (product.right, right)]
        (weights, weights_layout), (value, value_layout) = sides[::-1] if swapped else sides
        probabilities = _probabilities(walker, weights, weights_layout, node)
        softmax = probabilities.softmax
        walk = ScoreWalk(walker, probabilities.summed, probabilities.kept)
        scores = walk.find(softmax.source, probabilities.layout, softmax.reader)
        return cls(walker, node, layout, value, value_layout, summed, probabilities, scores)

    def site(self) -> AttentionSite:
        """The attention site, with its obstacle if there is one."""
        left, right, channels = operand_layouts(self.scores.product, self.scores.node, self.scores.layout)
        query, key = (self.scores.product.left, left), (self.scores.product.right, right)
        if not set(self.keys) <= set(all_leaves(right)):
            query, key = key, query
        value = (self.value, self.value_layout)
        nodes = {"query": query[0], "key": key[0], "value": value[0]}
        obstacles = [*self.probabilities.obstacles, *self.scores.obstacles, *self._changes(nodes)]
        if set(self.keys) != set(leaves(self.summed)):
            obstacles.append(
                "the softmax runs over another dimension than keys; use the dimension that value sums over"
            )
        plain = AttentionSite(self.node, Input(query[0]), Input(key[0]), Input(value[0]), scores=self._nodes())
        if obstacles:
            return replace(plain, obstacle=obstacles[0])
        try:
            return self._arranged(plain, query, key, value, channels)
        except Misaligned:
            return replace(plain, obstacle="query, key, value and output do not share batch and heads; expand them")

    @property
    def keys(self) -> Dim:
        """The axes of the keys."""
        return self.probabilities.keys

    def _nodes(self) -> frozenset[Node]:
        return frozenset([*self.probabilities.nodes, *self.scores.nodes])

    def _changes(self, nodes: dict[str, Node]) -> list[str]:
        """The in-place writes to inputs between the product of query and key and the output, in sentences."""
        return [
            f"{name} is changed in place while attention is computed; change it afterwards"
            for name, node in nodes.items()
            if self.walker.is_changed(node, self.scores.node, self.node)
        ]

    def _arranged(
        self,
        site: AttentionSite,
        query: tuple[Node, Layout],
        key: tuple[Node, Layout],
        value: tuple[Node, Layout],
        channels: Dim,
    ) -> AttentionSite:
        """The site with everything laid out as the operator takes it."""
        queries, keys = (self.walker.operands(*item, self.node) for item in (query, key))
        values = self.walker.operands(*value, self.node, scaled=False)
        rows, batch = self._rows(query[1], key[1])
        value_channels = tuple(x for x in all_leaves(self.value_layout) if x not in {*rows, *batch, *self.keys})
        kept = fewest_axes(keys) | fewest_axes(values)
        roles = Roles.of(batch, kept, rows, self.keys, leaves(channels), value_channels)
        chosen_query, chosen_key = choose(queries, roles.query), choose(keys, roles.key)
        chosen_value = choose(values, roles.value)
        dtype = reduce(torch.promote_types, (x.tensor.dtype for x in (chosen_query, chosen_key, chosen_value)))
        return replace(
            site,
            query=laid_out(chosen_query, roles.query, dtype),
            key=laid_out(chosen_key, roles.key, dtype),
            value=laid_out(chosen_value, roles.value, dtype),
            masks=tuple(map(roles.mask_tensor, self.scores.masks)),
            scale=(*(self.scores.inner or ()), *self.scores.factors, *chosen_query.factors, *chosen_key.factors),
            softcap=None if self.scores.inner is None else tuple(self.scores.factors),
            sinks=self._sinks(roles),
            enable_gqa=bool(roles.heads_per_kv_head),
            output=(*relayout(roles.output, self.layout), *self._cast(dtype)),
            passed=frozenset(node for item in (queries, keys, values) for node in item[-1].passed)
            | frozenset(self.scores.passed),
        )

    def _sinks(self, roles: Roles) -> Input | None:
        """The sinks [Hq]."""
        if self.scores.sink is None:
            return None
        layout = (roles.heads + roles.heads_per_kv_head,)
        sources = self.walker.operands(*self.scores.sink, self.node, scaled=False)
        return laid_out(choose(sources, layout), layout)

    def _cast(self, dtype: torch.dtype) -> tuple[Step, ...]:
        """The tensor methods that give an output of `dtype` the dtype of the matched one."""
        output = fake_tensor(self.node)
        return () if output is None or output.dtype == dtype else (("to", (output.dtype,)),)

    def _rows(self, query: Layout, key: Layout) -> tuple[Dim, Dim]:
        """The axes of the queries' positions, and those of batch and heads."""
        order = [x for x in all_leaves(self.probabilities.layout) if x not in leaves(self.probabilities.summed)]
        others = {*all_leaves(key), *all_leaves(self.value_layout)}
        own = [x for x in order if x in all_leaves(query) and x not in others]
        return tuple(own[-1:]), tuple(x for x in order if x not in own[-1:])


@dataclass(frozen=True)
class Roles:
    """The axes of an attention by their role: `heads` are the KV heads, `heads_per_kv_head` the query heads of each."""

    batch: Dim
    heads: Dim
    heads_per_kv_head: Dim
    queries: Dim
    keys: Dim
    channels: Dim
    value_channels: Dim

    @classmethod
    def of(cls, batch: Dim, kept: set[Axis], queries: Dim, keys: Dim, channels: Dim, value_channels: Dim) -> Roles:
        """The roles, of which `batch` are batch and heads, those in `kept` also of key and value."""
        own = tuple(x for x in batch if x in kept)
        heads_per_kv_head = tuple(x for x in batch if x not in kept)
        return cls(own[:1], own[1:], heads_per_kv_head, queries, keys, channels, value_channels)

    @property
    def query(self) -> Layout:
        return self.batch, self.heads + self.heads_per_kv_head, self.queries, self.channels

    @property
    def key(self) -> Layout:
        return self.batch, self.heads, self.keys, self.channels

    @property
    def value(self) -> Layout:
        return self.batch, self.heads, self.keys, self.value_channels

    @property
    def output(self) -> Layout:
        return self.batch, self.heads + self.heads_per_kv_head, self.queries, self.value_channels

    def mask_tensor(self, mask: ScoreMask) -> MaskTensor:
        """A mask with the axes of its dimensions as those of scores [batch, heads, queries, keys]."""
        return mask_tensor(mask, (self.batch, self.heads + self.heads_per_kv_head, self.queries, self.keys))
