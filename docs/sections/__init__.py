"""The sections of docs/results.md, by topics."""
