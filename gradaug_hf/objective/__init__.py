"""The paper on one page: the objective, its losses, and how sub-networks and their images are sampled."""
