"""Which rank holds which elements; pure functions of shapes and numbers."""
