"""What a model's output says: which tensor is compared, how far two differ, gradients of it."""
