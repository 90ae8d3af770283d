"""How good a generator is: distances of image distributions, and what only a head seen from all sides can get wrong."""
