"""The verbs of the command line, one module each with ``main(words)``; nothing heavy is imported before a verb needs it."""
