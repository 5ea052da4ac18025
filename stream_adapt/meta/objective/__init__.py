"""What the outer loop minimises. Every objective reads θ and padded user sequences, and is differentiable in θ."""
