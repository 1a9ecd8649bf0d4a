"""Teach and train: shared by `run` and `fit`, with results on disk so that an interrupted command resumes."""
