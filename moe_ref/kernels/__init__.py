"""What makes a backend of `Experts` fast on one kind of machine."""
