"""A backend of Triton kernels for CUDA: the walk of the reference, with a kernel where that has an autograd graph."""
