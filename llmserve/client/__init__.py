"""Clients of an engine: in a child process, on a thread, and offline. All speak the same protocol."""
