"""Drawings of records, for PNG files and for pages."""
