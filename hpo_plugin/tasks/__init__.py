"""Tasks: problems, prompts and rewards. They import neither verl nor the mathematics."""
