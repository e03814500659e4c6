"""The verb `distill cache`: fills a cache of teacher states, shard by shard, here or on an engine."""
