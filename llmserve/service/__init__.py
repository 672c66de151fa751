"""The life of a request between a frontend and an engine: validate, tokenize, submit, detokenize, account.

Knows neither HTTP nor gRPC nor the engine's inside: it speaks to an `EngineClient` and yields plain deltas.
"""
