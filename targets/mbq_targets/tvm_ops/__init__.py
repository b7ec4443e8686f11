"""The operations of a decoder as TIR. A Relax module calls them; each is one function on whole tensors.

Sliced products, rounding of activations, sums of routers and rows of the embedding are the kernels of
``mbq_targets.kernels``, as in the ONNX op library. The functions here divide them among threads and do the rest of a
decoder around them.
"""
