"""`ia2mini run`: train, score and compare methods on tasks × N with one model."""
