"""What other implementations answer: recordings for everyday tests, and the means to make them anew."""
