"""The nemesis: faults on purpose, seeded and counted where they are made, and a verdict on what came of them. ``scripts/chaos`` runs it."""
