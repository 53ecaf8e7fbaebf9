"""YAML files that Hydra composes; ``swarmtune/config.py`` says what they may hold."""
