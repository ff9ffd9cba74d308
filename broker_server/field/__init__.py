"""Field runs: an experiment with a running fleet that is planned, recorded and reported."""
