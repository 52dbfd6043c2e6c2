"""Ground floor: tables, the simulator, public data, splits and encoded features."""
