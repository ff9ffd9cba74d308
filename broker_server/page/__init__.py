"""The page of a gateway: the fleet as it is now, runs and their comparison, over plain HTTP on this machine."""
