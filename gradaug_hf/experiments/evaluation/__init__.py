"""Trained models side by side: under attacks and corruptions, and at several widths."""
