"""Checkpoints without a layout: safetensors files of slices, and a manifest.

Source of the idea: PyTorch's distributed checkpoints, without their pickle.
"""
