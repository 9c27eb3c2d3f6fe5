"""Expert stores: one file for each backend."""
