"""Our inference engine: continuous batching, caches by layer kind, speculative decoding with MTP heads."""
