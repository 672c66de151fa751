"""Wire formats: what clients see. Each frontend maps its wire onto `llmserve.service` and back, and nothing more."""
