"""Local mechanisms: windows, neighbourhoods, partitions. One file a paper."""
