"""What each lever makes of a counted step: products in 8 bits, projections in one launch, modulation made ahead.

Every function takes a step's kernels (``paper_count.py``) and gives those that are left with the lever. What a lever
does to the picture is not its concern.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

from paper_count import Operation

LEAST = 512  # inner and outer size of the products that are quantised: those of the blocks, not the ends'


def inner(operation: Operation) -> int:
    """The size that a matrix product sums over."""
    rows, columns, count = operation.tiles
    return round(operation.flops / (2 * rows * columns * count))


def is_linear(operation: Operation) -> bool:
    """Whether it is one large product with a weight, of more than one row."""
    rows, columns, count = operation.tiles
    large = bool(operation.flops) and not operation.attention and count == 1 and rows > 1
    return large and min(columns, inner(operation)) >= LEAST


def is_modulation(operation: Operation) -> bool:
    """Whether it is a product of one row, which reads a whole weight for it: the noise level's way to the blocks."""
    rows, columns, count = operation.tiles
    return bool(operation.flops) and not operation.attention and rows * count == 1 and columns >= LEAST


def eight_bits(operations: Sequence[Operation]) -> list[Operation]:
    """Weights and activations of the linear layers in 8 bits, with a kernel that scales and rounds every input.

    Layers that follow each other and read the same input share it.
    """
    found: list[Operation] = []
    before = (0, 0)
    for operation in operations:
        if not is_linear(operation):
            found.append(operation)
            before = (0, 0)
            continue
        (rows, columns, _), depth = operation.tiles, inner(operation)
        if before != (rows, depth):
            found.append(Operation(0.0, (0, 0, 0), False, 3.0 * rows * depth))
        before = (rows, depth)
        found.append(replace(operation, bytes=operation.bytes - depth * (rows + columns), eight=True))
    return found


def narrow_weights(operations: Iterable[Operation], bits: int) -> list[Operation]:
    """Weights of the linear layers in few bits, products as before: fewer bytes are read and no fewer multiplied."""
    found = []
    for operation in operations:
        saved = inner(operation) * operation.tiles[1] * (2 - bits / 8) if is_linear(operation) else 0
        found.append(replace(operation, bytes=operation.bytes - saved))
    return found


def together(operations: Sequence[Operation]) -> list[Operation]:
    """Products that read the same input one after the other in one launch, as ``fuse_qkv_projections`` makes them."""

    def like(numbered: tuple[int, Operation]) -> tuple[int, ...]:
        number, operation = numbered
        if not is_linear(operation):
            return (-1, number)
        return operation.tiles[0], inner(operation)

    groups = itertools.groupby(enumerate(operations), like)
    return [_one_launch([operation for _, operation in group]) for _, group in groups]


def with_feed_forward(operations: Sequence[Operation]) -> list[Operation]:
    """After :func:`together`: QKV and the product that enters the MLP, in blocks that give both the same input.

    FLUX's single blocks do: the MLP's product comes first, its activation next, QKV behind it.
    """
    found, rest = [], list(operations)
    while rest:
        first, *behind = rest[:3]
        if len(behind) == 2 and _read_the_same(first, *behind):
            found += [_one_launch([first, behind[1]]), behind[0]]
            del rest[:3]
        else:
            found.append(rest.pop(0))
    return found


def _read_the_same(entry: Operation, activation: Operation, qkv: Operation) -> bool:
    if activation.flops or not (is_linear(entry) and is_linear(qkv)):
        return False
    return (entry.tiles[0], inner(entry)) == (qkv.tiles[0], inner(qkv)) and qkv.tiles[1] == 3 * inner(qkv)


def _one_launch(members: Sequence[Operation]) -> Operation:
    """Products with one input, as one product of all their columns."""
    if len(members) == 1:
        return members[0]
    rows, _, count = members[0].tiles
    again = (len(members) - 1) * 2 * rows * inner(members[0])  # the input is read once
    columns = sum(operation.tiles[1] for operation in members)
    size = sum(operation.bytes for operation in members) - again
    flops = sum(operation.flops for operation in members)
    return replace(members[0], flops=flops, tiles=(rows, columns, count), bytes=size)


def without_modulation(operations: Iterable[Operation]) -> list[Operation]:
    """What is left of a step whose modulations are there."""
    return [operation for operation in operations if not is_modulation(operation)]


def modulation_ahead(operations: Iterable[Operation], rows: int) -> list[Operation]:
    """Modulations of ``rows`` steps at once: every weight is read once for all of them."""
    found = []
    for operation in filter(is_modulation, operations):
        (_, columns, count), depth = operation.tiles, inner(operation)
        further = 2.0 * (rows - 1) * (columns + depth)
        found.append(
            replace(
                operation, flops=operation.flops * rows, tiles=(rows, columns, count), bytes=operation.bytes + further
            )
        )
    return found


def weight_bytes(operations: Iterable[Operation]) -> tuple[int, int]:
    """Bytes in 16 bits of the weights that a step reads: those of the linear layers, and those of modulations."""
    linear = modulation = 0
    for operation in operations:
        size = 2 * inner(operation) * operation.tiles[1] if operation.flops and not operation.attention else 0
        linear += size if is_linear(operation) else 0
        modulation += size if is_modulation(operation) else 0
    return linear, modulation
