"""From a recipe and checkpoints to what will be exported: networks, sizes, and whether a pair fits together."""
