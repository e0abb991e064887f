"""What `compare`, `benchmark` and `plan` are made of."""
