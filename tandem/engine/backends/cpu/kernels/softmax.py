"""One row of a block of attention scores becomes weights: the step between the two products of `prefill.py`, in
LLVM's language, because numba neither keeps 64 scores in registers nor finds their maximum without a detour.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from tandem.engine.backends.cpu.kernels.tile import COLUMNS, Vectors

# 2^x for |x| <= 0.5 within 1 ulp (Cephes exp2f), highest power first.
_EXP2 = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
    1.0,
)
_LOWEST_POWER = -126.0
_MANTISSA_BITS = 23


@intrinsic  # type: ignore[untyped-decorator]
def weigh(_context: Any, scores: Any, scale: Any, top: Any, total: Any) -> Any:
    """64 scores become 2^(scale * score - maximum), never less than 2^-126; the maximum counts `top` in.

    Returns the maximum, and puts the sum of the weights at the address `total`. A NaN among the scores gives a NaN
    among weights and in the sum.
    """

    def codegen(_ctx: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return _Row(builder, *values).emit()

    return types.float32(types.int64, types.float32, types.float32, types.int64), codegen


class _Row(Vectors):
    """Emits the code of one row where the builder stands."""

    def __init__(self, builder: Any, scores: Any, scale: Any, top: Any, total: Any) -> None:
        super().__init__(builder)
        self.scale, self.top, self.total = self.spread(scale), self.spread(top), total
        self.places = [self.at(scores, 4 * self.WIDTH * i) for i in range(COLUMNS // self.WIDTH)]

    def emit(self) -> Any:
        builder = self.builder
        scores = [builder.load(place, align=4) for place in self.places]
        largest = self._over_lanes(self._largest, self._over(self._largest, scores))
        top = self._largest(builder.fmul(largest, self.scale), self.top)
        weights = [self._exp2(self.fma(score, self.scale, builder.fneg(top))) for score in scores]
        for weight, place in zip(weights, self.places, strict=True):
            builder.store(weight, place, align=4)
        total = self._over_lanes(builder.fadd, self._over(builder.fadd, weights))
        builder.store(self.first(total), self.at(self.total, 0, ir.FloatType()), align=4)
        return self.first(top)

    def _exp2(self, x: Any) -> Any:
        builder = self.builder
        x = self._largest(self.constant(_LOWEST_POWER), x)
        whole = self.rounded(x)
        rest = builder.fsub(x, whole)
        result = self.constant(_EXP2[0])
        for coefficient in _EXP2[1:]:
            result = self.fma(result, rest, self.constant(coefficient))
        power = builder.shl(builder.fptosi(whole, self.INTS), self.constant_int(_MANTISSA_BITS))
        return builder.bitcast(builder.add(builder.bitcast(result, self.INTS), power), self.FLOATS)

    def _largest(self, a: Any, b: Any) -> Any:
        """b where one of them is a NaN."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def _over(self, join: Any, vectors: list[Any]) -> Any:
        while len(vectors) > 1:
            vectors = [join(a, b) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        return vectors[0]

    def _over_lanes(self, join: Any, vector: Any) -> Any:
        """In every lane the result over all lanes."""
        distance = self.WIDTH // 2
        while distance:
            vector = join(vector, self.shuffle(vector, [lane ^ distance for lane in range(self.WIDTH)]))
            distance //= 2
        return vector
