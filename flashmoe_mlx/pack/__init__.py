"""Packs: writing, opening, and verification."""
