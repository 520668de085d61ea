"""Decoder models read from `config.json`: one file per family, one decoder for all."""
