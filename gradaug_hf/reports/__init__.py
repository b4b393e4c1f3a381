"""Model card, plots and training history, made from data alone."""
