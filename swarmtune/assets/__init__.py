"""Files that travel inside the package: the pocket BLOOM of the first run and its tokenizer."""
