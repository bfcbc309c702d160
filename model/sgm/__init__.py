"""SGM (seed 001): learning without gradients, locking what matters, and memories kept outside the weights."""
