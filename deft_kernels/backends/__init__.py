"""Where a call is computed: `choice` says by whom; `pytorch` and `triton` do the same steps, a file each."""
