"""Stands in for flash-attn, which needs CUDA: OpenRLHF imports these names, and calls none of them in the tests."""
