"""What the command line runs: pipeline, sweep, study, worker, estimate, and looks at finished runs."""
