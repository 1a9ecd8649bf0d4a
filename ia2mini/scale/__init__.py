"""Wrappers that make the core faster or make it fit into memory. The core does not import them."""
