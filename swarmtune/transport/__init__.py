"""Door 6: bytes to bytes. hivemind stays behind ``hivemind.py``; ``loopback.py`` stands in for it inside one process."""
