"""Models of other packages, whose routed experts come from a store. Only this room imports MLX-LM."""
