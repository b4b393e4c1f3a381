"""Training that goes on as if it had never stopped, and stops where it must."""
