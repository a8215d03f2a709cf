"""Triton kernels, one file per op: launch functions over allocated tensors, no autograd. Importing one needs triton."""
