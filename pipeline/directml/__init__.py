"""DirectML: what its graphs may hold, and how one is really run on it."""
