"""The built-in images: OpenMoji drawings, their names, layers and splits."""
