"""Pictures of runs: reading what a run wrote, drawing it as PNG and as a page."""
