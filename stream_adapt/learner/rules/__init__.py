"""Update rules. Each has its row layout, a sequential `step` (compiled) and a `batched` version (torch)."""
