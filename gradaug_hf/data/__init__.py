"""Image datasets: loading, decoding, transforming, seeding and collating."""
