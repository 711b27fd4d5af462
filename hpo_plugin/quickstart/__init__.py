"""A task with a laptop form: data, a start model, a training run of verl on CPU cores, and a picture of it."""
