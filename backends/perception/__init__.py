"""How a language model sees: one file per paper, its loss beside it."""
