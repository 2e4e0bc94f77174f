"""The Triton kernels. Nothing outside this folder imports Triton, and this folder only on first use.

Order of the rooms: `device` (arithmetic) <- `state` (a row's reduction) and `objectives` <- `finish` (loss
and coefficients), `parts` (states in memory) and `sweep` (the gradient's pass) <- `row_kernels` (the kernels)
<- `call` (what launches share) <- `launch`.
"""
