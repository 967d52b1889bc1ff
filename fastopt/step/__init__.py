"""How a step happens."""
