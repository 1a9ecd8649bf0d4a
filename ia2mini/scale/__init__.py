"""What wraps the core from outside, to be fast or to fit: the core knows nothing of it."""
