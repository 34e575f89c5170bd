"""The attention lab: change attention in ten lines, and see what it did."""
