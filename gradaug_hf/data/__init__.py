"""Image datasets: loading, preparing, seeding, and replacing images that cannot be read."""
