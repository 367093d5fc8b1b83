"""The executors: every form against explicit loops and against one another."""
