"""Several machines as one: the group of nodes that MLX connects, their messages, and a watchdog over each wait."""
