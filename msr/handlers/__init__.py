"""The databases msr speaks to."""
