"""Tools beside the server: measuring, converting, judging. Each is a set of modules with a common prefix."""
