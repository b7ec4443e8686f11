"""Kernels of a whole decoding step as TIR, one source for OpenCL C and WGSL.

Every kernel takes storage buffers alone: positions, counts, thresholds and tokens lie in one small
buffer (``state``), so a plan of launches never changes from token to token.  All arithmetic is
float32 and every word of weights is a 32-bit load, so no device needs half floats, bytes or
subgroups.  ``source`` lowers kernels to text.
"""
