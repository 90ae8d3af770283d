"""How fast things are. See README.md in this folder for the method."""
