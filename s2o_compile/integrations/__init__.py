"""What other libraries see of this package."""
