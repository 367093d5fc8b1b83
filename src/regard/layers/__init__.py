"""Small parametrised layers that several papers share: norms, positional encodings, pooling. One theme a module."""
