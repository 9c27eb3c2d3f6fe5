"""The contract of expert stores, and the parts that the stores in ``backends/`` consist of."""
