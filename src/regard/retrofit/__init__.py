"""Mechanisms into live models: ``with regard.retrofit(model, "moba", layers=[0, 2], top_k=4) as handle: ...``."""

from regard.retrofit.handle import Handle, retrofit
from regard.retrofit.sites import Site, discover

__all__ = ["Handle", "Site", "discover", "retrofit"]
