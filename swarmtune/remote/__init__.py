"""Doors 2 to 4: the remote body as a module, its autograd function, and the chain of calls behind it."""
