"""`compile`, and the searches that run stages again."""
