"""Attention on feature maps ``(batch, channels, *space)``. One file a paper."""
