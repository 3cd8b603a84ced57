"""The text of the course: where it comes from, the incident desk, and batches of it."""
