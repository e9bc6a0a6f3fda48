"""A schedule, a solver's table and the guidance as one row per step."""
