"""`ia2mini run`: tasks × N on one model, every method trained, scored and compared."""
