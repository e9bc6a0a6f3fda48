"""How good pictures are: distances between distributions, precision and recall, accuracy, and pairs of equal seeds."""
