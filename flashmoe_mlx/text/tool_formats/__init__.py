"""Formats in which models write tool calls, one module for each, and the parts that they share."""
