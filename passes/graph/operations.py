"""Operations in a normal form, each with its operands: the kinds that attention is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node


@dataclass(frozen=True)
class Product:
    """A sum over the axes that `left` and `right` share and the result does not have; an axis is named by its letter.

    `bias`, if any, is added with the factor `bias_scale`; the product itself has the factor `scale`.
    """

    left: Node
    right: Node
    left_axes: str
    right_axes: str
    axes: str
    scale: Any = 1
    bias: Node | None = None
    bias_scale: Any = 1

    @property
    def contracted(self) -> str:
        """The axes that are summed over."""
        return "".join(axis for axis in self.left_axes if axis not in self.axes)


@dataclass(frozen=True)
class Softmax:
    """A softmax over the dimension `dim`."""

    source: Node
    dim: int


@dataclass(frozen=True)
class LogSoftmax:
    """The logarithm of a softmax over the dimension `dim`."""

    source: Node
    dim: int


@dataclass(frozen=True)
class Scaled:
    """`source` times `factor`, or divided by it; which operand of a product is which is not known."""

    source: Any
    factor: Any
    inverted: bool = False


@dataclass(frozen=True)
class Sum:
    """`left` plus `sign` times `right`."""

    left: Any
    right: Any
    sign: int = 1


@dataclass(frozen=True)
class Filled:
    """`source` where `mask` is `keep`, `value` elsewhere."""

    source: Any
    mask: Node
    value: Any
    keep: bool


@dataclass(frozen=True)
class Same:
    """`source` itself, up to its precision."""

    source: Node


@dataclass(frozen=True)
class Dropout:
    """`source` with random elements set to zero."""

    source: Node


@dataclass(frozen=True)
class Viewed:
    """The elements of `source` in the same order, in another shape."""

    source: Node


@dataclass(frozen=True)
class Permuted:
    """`source` with its dimensions in another order."""

    source: Node
    order: tuple[int, ...]


@dataclass(frozen=True)
class Expanded:
    """`source` broadcast to another shape."""

    source: Node


@dataclass(frozen=True)
class Repeated:
    """`source` with each element along `dim` repeated in place."""

    source: Node
    dim: int


@dataclass(frozen=True)
class Tanh:
    """The hyperbolic tangent of `source`."""

    source: Node


@dataclass(frozen=True)
class Clamped:
    """`source`, or `least` where it is less; which operand is which is not known."""

    source: Any
    least: Any


@dataclass(frozen=True)
class Cleaned:
    """`source` with zeros in place of NaN, as it stands in rows of probabilities that see nothing."""

    source: Node


@dataclass(frozen=True)
class Concatenated:
    """Tensors one after another along `dim`."""

    sources: tuple[Node, ...]
    dim: int


@dataclass(frozen=True)
class Narrowed:
    """The elements of `source` along `dim` from `start` on, and not all."""

    source: Node
    dim: int
    start: int


Operation = (
    Product | Softmax | LogSoftmax | Scaled | Sum | Filled | Same | Dropout | Viewed | Permuted | Expanded | Repeated
    | Tanh | Clamped | Cleaned | Concatenated | Narrowed
)  # fmt: skip
