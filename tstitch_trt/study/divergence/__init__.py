"""How far members are apart at each noise level, and orders of members from it."""
