"""The command line, and the two composition roots: `serve` for the frontend, `engine_main` for the engine child."""
