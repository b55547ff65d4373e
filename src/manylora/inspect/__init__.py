"""Why an adapter works, or does not."""
