"""Settings, runs, sweeps and tables that the recipes share."""
