"""Which rank holds which elements, and how they move: pure functions of shapes and numbers."""
