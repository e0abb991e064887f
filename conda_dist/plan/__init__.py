"""Who computes, sends and decomposes what, and when: pure functions of layouts and numbers."""
