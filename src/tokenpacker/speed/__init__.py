"""What an image and its answer cost in time and memory."""
