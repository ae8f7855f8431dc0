"""From files on disk to device batches."""
