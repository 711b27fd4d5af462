"""How a recipe places its model and batch on GPUs, and the memory that this takes."""
