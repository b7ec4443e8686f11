"""Kernels as TIR: one source for every instruction set.

* ``layout`` plans, in plain Python, how the planes of a depth become dot-product operands.
* ``isa`` holds what differs between instruction sets.
* ``matmul``, ``few``, ``activations``, ``router``, ``gate`` and ``gather`` write the loops.
* ``module`` collects the kernels of one ``KernelSpec``.

Names: ``gemv`` multiplies one token, ``few`` some tokens of one depth, ``gemm`` many, and ``gather`` reads a row of a
table. ``_dK`` is the depth the kernel is compiled for. ``quantize``, ``router_sums`` and ``gate_ACTIVATION`` serve all
depths.
"""
