"""The command line: python -m mmkit."""
