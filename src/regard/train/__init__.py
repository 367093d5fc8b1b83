"""Training methods that papers bring with their attention: distillation, adapters, losses."""
