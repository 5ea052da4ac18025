"""State: rows of users and items in a slab, the slab's memory, their bytes, and the overlay that an abort puts back."""
