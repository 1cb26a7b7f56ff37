"""What lives on a device: the quantized model and the side-branches on its linear layers."""
