"""Lowers a calibrated decoder for an engine.

builder: the steps of a decoder, and the interface of an engine's builder; decoder: the one walk over a decoder.
onnx: the builder of ONNX graphs; onnx_attention, onnx_delta, onnx_experts: its larger steps; onnx_graph: how a graph is
written; onnx_functions, onnx_matmul, onnx_router, onnx_text: the bodies of our ops in stock ops, for bundles without a
native library.
tvm: the builder of Relax modules; tvm_weights: the weights file beside them.
gpu: the builder of launches; gpu_launches: how they are recorded, and the plan that holds them.
"""
