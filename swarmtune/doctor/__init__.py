"""``swarmtune doctor``: what is wrong with this machine or with a swarm, and what to do about it."""
