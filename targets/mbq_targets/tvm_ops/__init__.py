"""A decoder's operations as TIR, called by a Relax module: each is one function on whole tensors.

The sliced products, the activations' rounding, the router's sums and the embedding's rows are the
functions of ``targets.kernels``, the same that the ONNX op library is built from; what is here
shares them out over threads and does the rest of a decoder around them.
"""
