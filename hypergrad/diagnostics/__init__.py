"""What happened, in numbers and pictures."""
