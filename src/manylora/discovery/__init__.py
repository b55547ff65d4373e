"""Tasks hidden in a corpus: clusters of its prompts, and so the number of branches."""
