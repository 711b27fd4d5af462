"""verl's training loop for models of some 200,000 parameters, in one process and bare torch, without Ray."""
