"""For each exercise the right answer, and plausible wrong ones."""
