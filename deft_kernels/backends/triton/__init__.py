"""The Triton kernels. Nothing outside this folder imports Triton, and this folder only on first use.

Imports go one way:

    records (what belongs together), arithmetic <- edges, lanes <- predicted <- state (a row's reduction)
    objectives <- finish (loss and coefficients), stored_states (states in memory), gradient (the pass that
    writes it), rows <- kernels, gradient_kernels, batch_kernels, launch (what the launches of a call share;
    `tuning` has their parameters) <- backend
"""
