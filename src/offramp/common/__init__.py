"""Small helpers of the rooms outside the core."""
