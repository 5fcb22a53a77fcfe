"""Student families, one module each: a factory of the network, and how the network can grow."""
