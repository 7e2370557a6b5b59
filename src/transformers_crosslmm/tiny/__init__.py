"""The bundled checkpoint, and everything that made it."""
