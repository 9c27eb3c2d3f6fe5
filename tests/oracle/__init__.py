"""Outputs of other implementations: recordings for the everyday tests, and programs that make them."""
