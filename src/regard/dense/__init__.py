"""Dense mechanisms on (query, key, value): every pair is computed. One file a paper."""
