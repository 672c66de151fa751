"""The engine: sequences, their KV blocks, and the plan → launch → collect loop over explicit data."""
