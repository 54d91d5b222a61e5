"""``python -m extend_attn tune``: measured plans for given problems, and how good the choice is without them."""
