"""The layout of a recipe over GPUs, and an estimate of its memory."""
