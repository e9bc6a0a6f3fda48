"""A bundle on disk: its manifest, weights, engine identities, and the cache that bundles share."""
