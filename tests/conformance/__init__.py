"""One table of all registered mechanisms, layers and features; one suite over it."""
