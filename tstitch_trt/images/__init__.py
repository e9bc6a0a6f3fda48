"""Picture files: reading, writing, grids and the parameters kept in them."""
