"""Door 5: messages to bytes and back. Data types, shapes, size limits and checksums are handled here and nowhere else."""
