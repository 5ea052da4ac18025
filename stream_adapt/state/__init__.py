"""State: rows of users and items in a slab, their bytes, and the overlay that an abort puts back."""
