"""Tensors in, tensors out: the mathematics of AGZO, without files, clocks or devices."""
