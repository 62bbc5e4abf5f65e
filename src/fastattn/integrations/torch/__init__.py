"""`torch.nn.functional.scaled_dot_product_attention`, served by fastattn. The door is `fastattn.drop_in`."""
