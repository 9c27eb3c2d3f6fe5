"""Bytes on disk: the record, extents, headers, manifests, routing traces, and the reading of untrusted files."""
