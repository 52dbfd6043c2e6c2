"""Tables, checks, public data, splits, encoded features and shown lists."""
