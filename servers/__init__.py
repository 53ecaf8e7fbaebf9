"""The server half: a span of frozen blocks behind a handler, on one device."""
