"""One file per op, read from top to bottom: reference, launch per backend, autograd.Function, functional."""
