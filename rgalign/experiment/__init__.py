"""Online experiments: planning, simulating and evaluating an A/B test."""
