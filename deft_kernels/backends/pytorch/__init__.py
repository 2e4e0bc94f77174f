"""The PyTorch backend, on any device. `backend` is what callers use; a file here and the one of the same name
in `triton` do the same step."""
