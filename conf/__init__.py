"""YAML files that Hydra composes; ``swarmtune/schema.py`` says what they may hold."""
