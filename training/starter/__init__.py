"""How the shipped policies are made from nothing: tokenizer, small configs, and one command for each policy."""
