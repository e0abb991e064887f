"""Which ranks compute, send and decompose what, and when: pure functions of layouts and numbers."""
