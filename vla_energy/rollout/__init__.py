"""Closed-loop evaluation: paired episodes of several arms on the same seeds.

Simulator processes import this package, so nothing here may import torch or TensorFlow.
"""
