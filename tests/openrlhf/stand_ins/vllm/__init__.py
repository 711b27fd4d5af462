"""Stands in for vLLM: OpenRLHF imports these names, and calls none of them in the tests."""

SamplingParams = None
