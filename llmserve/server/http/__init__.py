"""The HTTP frontend, OpenAI-compatible. `app.create_app` builds it, `run.run_server` serves it."""
