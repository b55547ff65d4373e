"""What `compose` is made of: adapters as factors, their combination, the rows of the new task."""
