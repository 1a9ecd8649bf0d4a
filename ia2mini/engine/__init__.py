"""Teach, train, score: what `run` and `fit` share, kept on disk so that an interrupted command goes on."""
