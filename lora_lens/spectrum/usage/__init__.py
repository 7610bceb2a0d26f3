"""How a model's code uses its layers, read from the code: called, or read in another way."""
