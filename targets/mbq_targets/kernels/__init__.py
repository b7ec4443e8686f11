"""Kernels as TIR, one source for every instruction set.

``layout`` decides, in plain Python, how the planes of a depth become dot-product operands;
``isa`` holds what differs between instruction sets; ``matmul``, ``activations``, ``router`` and
``gather`` emit the loops; ``module`` collects them for one ``KernelSpec``.
"""
