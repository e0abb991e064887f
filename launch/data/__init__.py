"""From text to the rows of each step."""
