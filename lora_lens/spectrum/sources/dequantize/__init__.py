"""Quantized layers of a file as matrices: packed integers unpacked, scales applied.

A format is recognized by the names, shapes and dtypes of what a layer consists of, and by the config where
these leave a choice. What comes out is float32, whatever dtype the model computes in; no library is needed,
but torchao for its own tensors.
"""
