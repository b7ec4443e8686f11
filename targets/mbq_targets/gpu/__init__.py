"""Kernels of a whole decoding step as TIR, one source for OpenCL C and WGSL.

Every kernel takes storage buffers only. Positions, counts, thresholds and tokens are in one small buffer (``state``),
so the plan of launches is the same for every token. All arithmetic is float32 and all loads of weights are 32-bit
words, so a device needs neither half floats, bytes nor subgroups. ``source`` lowers kernels to text.
"""
