"""The Triton kernels. Nothing outside this folder imports Triton, and this folder only on first use.

Imports go one way: `arithmetic` and `edges` <- `state` (a row's reduction) and `objectives` <- `finish` (loss
and coefficients), `stored_states` (states in memory) and `gradient` (the pass that writes it) <- `kernels`
<- `launch` (what the launches of a call share; `tuning` has their parameters) <- `backend`.
"""
