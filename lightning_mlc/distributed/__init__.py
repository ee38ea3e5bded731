"""A model split over processes: FSDP2 as a Lightning strategy, and tensor parallelism inside it."""
