"""The instructions that the hardware approximates: 2^x, log2 and the full-range quotient.

What a GPU gives is known to be within the errors that the PTX ISA manual (version 8.8) states, nothing more:

    ex2.approx.f32   9.7.3.21   2 ulp from the correctly rounded result, over all inputs
    lg2.approx.f32   9.7.3.20   2^-22 absolute for arguments in (0.5, 2), 2^-22 relative elsewhere
    div.full.f32     9.7.3.8    2 ulp, over all inputs

`Noise("exact")` rounds correctly, "up" and "down" err by all of it one way, "hash" by anything in it,
decided by the argument's bits and a seed (the hardware is deterministic: equal arguments, equal results).
Results that the manual lists (of zeros, infinities, NaN) stay what they are.
"""

from __future__ import annotations

import numpy as np

from .arithmetic import F4, F8, I4, NAN32, U4, Array, ftz

MODES = ("exact", "hash", "up", "down")
ULPS = 2
LOG_ERROR = 2.0**-22


class Noise:
    def __init__(self, mode: str = "exact", seed: int = 0):
        if mode not in MODES:
            raise ValueError(f"noise: unknown mode {mode!r}; known: {', '.join(MODES)}")
        self.mode, self.seed = mode, seed

    def uniform(self, *arguments: Array) -> Array:
        """-1 to 1 for each thread, by the arguments' bits."""
        if self.mode != "hash":
            return {"exact": 0.0, "up": 1.0, "down": -1.0}[self.mode]
        mixed: Array = U4((self.seed * 0x632BE5AB) & 0xFFFFFFFF)
        for x in arguments:
            bits = np.asarray(x).view(U4)
            mixed = (mixed ^ bits ^ (bits >> U4(15))) * U4(0x2C1B3C6D)
            mixed = (mixed ^ (mixed >> U4(12))) * U4(0x297A2D39)
        return (mixed ^ (mixed >> U4(15))).astype(F8) / 2.0**31 - 1.0

    def moved(self, y: Array, *arguments: Array) -> Array:
        """y up to 2 ulp away; zeros, infinities and NaN stay, and finite numbers stay finite."""
        if self.mode == "exact":
            return y
        steps = np.rint(ULPS * self.uniform(*arguments)).astype(I4)
        ordinary = np.isfinite(y) & (y != 0)
        # Up is towards +infinity: the bits of negative numbers run the other way. Not through zero.
        bits = y.view(I4)
        moved = (bits + np.where(np.signbit(y), -steps, steps)).view(F4)
        crossed = (np.signbit(moved) != np.signbit(y)) | ~np.isfinite(moved)
        return np.where(ordinary & ~crossed, moved, y)

    def exp2(self, x: Array) -> Array:
        """ex2.approx.f32."""
        y = np.exp2(x.astype(F8)).astype(F4)
        # 2^0 is listed as 1.
        return np.where(np.isnan(x), NAN32, np.where(x == 0, F4(1), self.moved(y, x)))

    def exp2_ftz(self, x: Array) -> Array:
        return ftz(self.exp2(ftz(x)))

    def log2(self, x: Array) -> Array:
        """lg2.approx.f32; NaN below zero, -inf at either zero."""
        exact = np.log2(x.astype(F8))
        y = exact.astype(F4)
        if self.mode != "exact":
            bound = np.where((x > 0.5) & (x < 2), LOG_ERROR, LOG_ERROR * np.abs(exact))
            wished = (exact + bound * self.uniform(x)).astype(F4)
            # Rounding to fp32 may leave the bound: back by one number.
            outside = np.abs(wished.astype(F8) - exact) > bound
            wished = np.where(outside, np.nextafter(wished, y), wished)
            y = np.where(np.isfinite(y), wished, y)
        return np.where(np.isnan(y), NAN32, y)

    def log2_ftz(self, x: Array) -> Array:
        return ftz(self.log2(ftz(x)))

    def quotient(self, a: Array, b: Array) -> Array:
        """div.full.f32."""
        q = np.divide(a, b, dtype=F4)
        return np.where(np.isnan(q), NAN32, self.moved(q, a, b))
