"""What a node of a graph is: its tensor, its operation, its dimensions, and what is written to it."""
