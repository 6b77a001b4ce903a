"""The innermost loop of products, written out in LLVM's language, because numba has no vector registers to hold sums
in; what else is to be written so (`softmax.py`) starts from `Vectors`.

A register tile is sums[rows, 64] += x[rows, depth] @ weights[depth, 64] with all sums in AVX-512 registers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

# Outputs of a tile: four vectors of 16 floats.
COLUMNS = 64
# Rows of the largest tile: 6 * 4 vectors of sums, 4 of weights and one input fit into 32 registers.
TILE_ROWS = 6
# A line of the processor's caches.
LINE_BYTES = 64

_VECTOR = 16
_PARTS = COLUMNS // _VECTOR
_WORD, _INT, _BYTE, _FLOAT = ir.IntType(64), ir.IntType(32), ir.IntType(8), ir.FloatType()
_VECTOR_TYPE = ir.VectorType(_FLOAT, _VECTOR)


@functools.cache
def registers_suffice() -> bool:
    """Whether this processor has the registers that the tiles are cut for."""
    return bool(binding.get_host_cpu_features().get("avx512f", False))


def register_tile(sizes: Iterable[int], lines: int, fresh: bool = False) -> Any:
    """A numba intrinsic tile(rows, x, x_stride, weights, depth, sums, ahead): int64; addresses, the stride in bytes.

    rows: one of `sizes`; of another number it does nothing. With each of the `depth` inputs it also fetches
    `lines` cache lines into the second-level cache, from `ahead` on. fresh: sums begin at zero, whatever is in memory.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(_context: Any, rows: Any, x: Any, x_stride: Any, weights: Any, depth: Any, sums: Any, ahead: Any) -> Any:
        def codegen(_ctx: Any, builder: Any, _signature: Any, values: Any) -> Any:
            done = builder.append_basic_block("tile_done")
            switch = builder.switch(values[0], done)
            for size in sizes:
                block = builder.append_basic_block(f"tile_of_{size}")
                switch.add_case(size, block)
                builder.position_at_end(block)
                _Tile(builder, size, lines, *values[1:]).emit(fresh)
                builder.branch(done)
            builder.position_at_end(done)
            return ir.Constant(_WORD, 0)

        return types.int64(*[types.int64] * 7), codegen

    return tile


class Vectors:
    """Emits operations on vectors of 16 floats where the builder stands."""

    WIDTH = _VECTOR
    FLOATS = _VECTOR_TYPE
    INTS = ir.VectorType(_INT, _VECTOR)

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def at(self, base: Any, offset: int, kind: Any = _VECTOR_TYPE) -> Any:
        return self.builder.inttoptr(self.builder.add(base, ir.Constant(_WORD, offset)), kind.as_pointer())

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        kind = ir.FunctionType(_VECTOR_TYPE, [_VECTOR_TYPE] * 3)
        return self.builder.call(self.function(f"llvm.fma.v{_VECTOR}f32", kind), [a, b, c])

    def rounded(self, x: Any) -> Any:
        kind = ir.FunctionType(_VECTOR_TYPE, [_VECTOR_TYPE])
        return self.builder.call(self.function(f"llvm.nearbyint.v{_VECTOR}f32", kind), [x])

    def spread(self, scalar: Any) -> Any:
        nothing = ir.Constant(_VECTOR_TYPE, ir.Undefined)
        return self.shuffle(self.builder.insert_element(nothing, scalar, ir.Constant(_INT, 0)), [0] * _VECTOR)

    def first(self, vector: Any) -> Any:
        return self.builder.extract_element(vector, ir.Constant(_INT, 0))

    def shuffle(self, vector: Any, lanes: list[int]) -> Any:
        nothing = ir.Constant(_VECTOR_TYPE, ir.Undefined)
        return self.builder.shuffle_vector(vector, nothing, ir.Constant(self.INTS, lanes))

    def constant(self, value: float) -> Any:
        return ir.Constant(_VECTOR_TYPE, [value] * _VECTOR)

    def constant_int(self, value: int) -> Any:
        return ir.Constant(self.INTS, [value] * _VECTOR)

    def function(self, name: str, kind: Any) -> Any:
        return self.builder.module.globals.get(name) or ir.Function(self.builder.module, kind, name)


class _Tile(Vectors):
    """Emits one tile where the builder stands."""

    def __init__(
        self, builder: Any, rows: int, lines: int, x: Any, stride: Any, weights: Any, depth: Any, sums: Any, ahead: Any
    ) -> None:
        super().__init__(builder)
        self.rows, self.lines = rows, lines
        self.x, self.stride, self.weights, self.depth, self.ahead = x, stride, weights, depth, ahead
        self.places = [self.at(sums, 4 * _VECTOR * i) for i in range(rows * _PARTS)]

    def emit(self, fresh: bool) -> None:
        builder = self.builder
        zeros = [self.constant(0.0)] * len(self.places)
        initial = zeros if fresh else [builder.load(place, align=4) for place in self.places]
        before, loop, after = builder.block, builder.append_basic_block("inputs"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        index = self._carried(_WORD, ir.Constant(_WORD, 0), before)
        totals = [self._carried(_VECTOR_TYPE, value, before) for value in initial]
        self._fetch(index)
        results = self._multiply(index, totals)
        following = builder.add(index, ir.Constant(_WORD, 1))
        for old, new in zip([index, *totals], [following, *results], strict=True):
            old.add_incoming(new, loop)
        builder.cbranch(builder.icmp_signed("<", following, self.depth), loop, after)
        builder.position_at_end(after)
        for place, result in zip(self.places, results, strict=True):
            builder.store(result, place, align=4)

    def _multiply(self, index: Any, totals: list[Any]) -> list[Any]:
        """The sums after one more input."""
        builder = self.builder
        line = builder.add(self.weights, builder.mul(index, ir.Constant(_WORD, 4 * COLUMNS)))
        weights = [builder.load(self.at(line, 4 * _VECTOR * i), align=4) for i in range(_PARTS)]
        column = builder.add(self.x, builder.mul(index, ir.Constant(_WORD, 4)))
        results = []
        for row in range(self.rows):
            address = builder.add(column, builder.mul(self.stride, ir.Constant(_WORD, row)))
            value = self.spread(builder.load(self.at(address, 0, _FLOAT), align=4))
            own = totals[row * _PARTS : (row + 1) * _PARTS]
            results += [self.fma(value, w, total) for w, total in zip(weights, own, strict=True)]
        return results

    def _fetch(self, index: Any) -> None:
        kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT, _INT, _INT])
        prefetch = self.function("llvm.prefetch.p0", kind)
        hints = [ir.Constant(_INT, hint) for hint in (0, 2, 1)]  # to read, into the second-level cache, data
        start = self.builder.add(self.ahead, self.builder.mul(index, ir.Constant(_WORD, self.lines * LINE_BYTES)))
        for line in range(self.lines):
            self.builder.call(prefetch, [self.at(start, line * LINE_BYTES, _BYTE), *hints])

    def _carried(self, kind: Any, initial: Any, before: Any) -> Any:
        value = self.builder.phi(kind)
        value.add_incoming(initial, before)
        return value
