"""A step on a device: the forward pass of a batch, its graphs, and the processes of a split model."""
