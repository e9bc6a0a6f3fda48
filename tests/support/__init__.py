"""What tests share: small models, bundles and pipelines made on the spot, stand-ins for absent hardware, oracles."""
