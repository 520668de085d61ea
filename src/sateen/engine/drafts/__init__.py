"""Speculative decoding with MTP heads: who drafts, how many drafts pay, and how they fared."""
