"""The ground floor: pure rules. Nothing here does IO, reads a clock or draws a random number."""
